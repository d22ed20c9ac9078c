"""Which graders of safety a config may name, and when one of them is the judge that makes the labels."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from judges.config import GradingConfig, JudgeGrader, OpenAIJudge, VllmRunBatchJudge, remotes_of, same_judge, sides_of
from judges.config import Judge as AnyJudge
from judges.selftest.config import judges_to_test

OPENAI = {"kind": "openai", "model": "gpt-x"}
LOCAL = {"base_url": "http://localhost:8000/v1", "api_key_env": "KEY"}
LLAMA_GUARD = {"kind": "guard", "format": "llama_guard", "model": "guard", **LOCAL}
WILDGUARD = LLAMA_GUARD | {"format": "wildguard"}
HEURISTIC = {"kind": "heuristic"}


def grading(safety: dict[str, Any]) -> GradingConfig:
    return GradingConfig.model_validate({"safety": safety})


def by_judge(judge: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "judge", "judge": judge}


def preference(judge: dict[str, Any]) -> Any:
    return TypeAdapter[Any](AnyJudge).validate_python(judge)


def test_a_judge_of_safety_reads_the_rubric_of_safety_unless_another_is_named() -> None:
    found = grading(by_judge(OPENAI)).safety
    assert isinstance(found, JudgeGrader)
    assert found.judge.rubric == "refusal-harm"
    assert JudgeGrader(kind="judge", judge=OpenAIJudge(kind="openai", model="gpt-x")).judge.rubric == "refusal-harm"
    own = grading(by_judge(OPENAI | {"rubric": "my.md"})).safety
    assert isinstance(own, JudgeGrader)
    assert own.judge.rubric == "my.md"
    assert GradingConfig.model_validate(grading(by_judge(OPENAI)).model_dump()) == grading(by_judge(OPENAI))


@pytest.mark.parametrize(
    ("judge", "why"),
    [
        ({"kind": "panel", "judges": [OPENAI, OPENAI]}, "a panel votes on pairs"),
        ({"kind": "verifier", "function": "a:b"}, "a grader of kind `verifier`"),
        ({"kind": "reward_model", "model": "rm"}, "a reward model gives a number"),
    ],
)
def test_a_judge_that_cannot_classify_is_refused_with_the_way_out(judge: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        grading(by_judge(judge))


@pytest.mark.parametrize("form", ["llama_guard", "shieldgemma"])
def test_a_guard_that_sees_harm_alone_may_not_grade_benign_prompts(form: str) -> None:
    guard = LLAMA_GUARD | {"format": form}
    for safety in (guard, {"kind": "by_side", "harmful": HEURISTIC, "benign": guard}):
        with pytest.raises(ValidationError, match=f"format {form} sees harm and no refusals.*by_side"):
            grading(safety)
    assert grading({"kind": "by_side", "harmful": guard, "benign": by_judge(OPENAI)})
    assert grading(WILDGUARD)


def test_a_guard_has_no_rubric_and_sides_do_not_nest() -> None:
    with pytest.raises(ValidationError, match="rubric"):
        grading(WILDGUARD | {"rubric": "refusal-harm"})
    sides = {"kind": "by_side", "harmful": HEURISTIC, "benign": HEURISTIC}
    with pytest.raises(ValidationError, match="benign"):
        grading({"kind": "by_side", "harmful": HEURISTIC, "benign": sides})


def test_every_model_is_found_by_the_path_of_its_key() -> None:
    assert list(sides_of(grading(HEURISTIC).safety)) == ["grading.safety"]
    assert remotes_of(grading(HEURISTIC).safety) == {}
    assert list(remotes_of(grading(by_judge(OPENAI)).safety)) == ["grading.safety.judge"]
    assert list(remotes_of(grading(WILDGUARD).safety)) == ["grading.safety"]
    both = grading({"kind": "by_side", "harmful": LLAMA_GUARD, "benign": by_judge(OPENAI)}).safety
    assert {path: remote.model for path, remote in remotes_of(both).items()} == {
        "grading.safety.harmful": "guard",
        "grading.safety.benign.judge": "gpt-x",
    }


SERVED = {"kind": "openai_compatible", "model": "local", **LOCAL}
PANEL = {"kind": "panel", "judges": [OPENAI | {"family": "gpt"}, SERVED | {"family": "llama"}]}


@pytest.mark.parametrize(
    ("judge", "safety", "is_same"),
    [
        (OPENAI, by_judge(OPENAI), True),
        (OPENAI, by_judge(OPENAI | {"effort": "high"}), True),
        (OPENAI, by_judge(OPENAI | {"model": "gpt-y"}), False),
        (PANEL, by_judge(SERVED), True),
        (PANEL, by_judge(SERVED | {"base_url": "http://localhost:8001/v1"}), False),
        (SERVED, by_judge(SERVED | {"kind": "vllm_label"}), True),
        (SERVED, by_judge(SERVED | {"kind": "anthropic", "base_url": "http://localhost:8000/"}), True),
        (SERVED, {"kind": "by_side", "harmful": LLAMA_GUARD, "benign": by_judge(SERVED)}, True),
        (SERVED, WILDGUARD, False),
        (SERVED | {"model": "guard"}, WILDGUARD, True),
        ({"kind": "verifier", "function": "a:b"}, by_judge(OPENAI), False),
        (OPENAI, HEURISTIC, False),
    ],
)
def test_a_safety_grader_that_also_makes_the_labels_is_told(judge: dict[str, Any], safety: dict[str, Any], is_same: bool) -> None:
    said = same_judge(preference(judge), grading(safety).safety)
    assert (said is not None) == is_same
    assert said is None or (said.startswith("grading.safety") and "also decides preferences" in said)


def test_models_that_run_batch_starts_are_told_by_their_weights() -> None:
    def run_batch(weights: str) -> VllmRunBatchJudge:
        return VllmRunBatchJudge(kind="vllm_run_batch", model="m", weights=weights)

    safety = JudgeGrader(kind="judge", judge=run_batch("/a"))
    assert same_judge(run_batch("/a"), safety)
    assert same_judge(run_batch("/b"), safety) is None


def test_graders_of_safety_are_not_tested_on_pairs() -> None:
    assert list(judges_to_test(preference(OPENAI), grading(by_judge(SERVED)))) == ["judge"]
