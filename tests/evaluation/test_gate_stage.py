"""The stage `gate` over published stages: it looks at how the answers and grades before it came to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.evaluation.stage import GATE
from dpo_loop.exchange import CONDITIONS, JUDGE_CANARY, read_gate_report
from dpo_loop.files import write_json, write_jsonl, write_text
from dpo_loop.types import GateReport, GateState, JudgeCanary, Message, PolicyName, Prompt, StageOutcome
from tests.evaluation.rounds import ANCHOR, CANDIDATE, CONFIG, POLICIES, PREVIOUS, answers, compare_all, prompts_of
from tests.evaluation.test_provenance import canary, conditions

PROMPTS = prompts_of(200)


class Evaluation:
    """The stages that a gate reads, published under `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.evalset = self.publish("evalset", {}, lambda out: write_jsonl(out / "prompts.jsonl", PROMPTS))
        self.answers: dict[PolicyName, Path] = {policy: self.answer(policy) for policy in POLICIES}
        self.grades = self.grade("grade", self.answers)

    def publish(self, name: str, inputs: dict[str, Any], write: Any) -> Path:
        def run(out: Path, **_: Any) -> StageOutcome:
            write(out)
            return StageOutcome()

        materialize(Stage(name, 1, run), self.path / name, **inputs)
        return self.path / name

    def answer(self, policy: PolicyName, name: str = "answer", **changed: Any) -> Path:
        said = conditions()[policy].model_copy(update=changed)

        def write(out: Path) -> None:
            write_json(out / CONDITIONS, said)
            write_text(out / "completions-00000.jsonl", f"{name}\n")

        return self.publish(f"{name}-{policy}", {}, write)

    def grade(self, name: str, made: dict[PolicyName, Path], prompts: Any = PROMPTS, judge: JudgeCanary | None = None) -> Path:
        def write(out: Path) -> None:
            write_jsonl(out / "grades.jsonl", [row for policy in POLICIES for row in answers(prompts, policy)])
            write_jsonl(out / "comparisons.jsonl", compare_all(prompts, num_wins=20, num_losses=10))
            if judge:
                write_json(out / JUDGE_CANARY, judge)

        return self.publish(name, dict(made), write)

    def gate(self, **inputs: Any) -> GateReport:
        given = {"prompts": self.evalset, "grades": self.grades, "answers": self.answers, "config": CONFIG} | inputs
        policies = {"candidate": CANDIDATE, "previous": PREVIOUS, "anchor": ANCHOR}
        materialize(GATE, self.path / "gate", **given, **policies, heuristic_safety=False, run_id="r", round=2)
        return read_gate_report(self.path / "gate")


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    return Evaluation(tmp_path)


def test_a_sound_evaluation_passes(evaluation: Evaluation) -> None:
    report = evaluation.gate()
    assert report.state is GateState.PASS
    assert {"adapter", "conditions"} <= {result["id"] for result in report.validity}
    assert report.config_sha256


def test_grades_that_were_made_of_other_answers_are_invalid(evaluation: Evaluation) -> None:
    others = {**evaluation.answers, "candidate": evaluation.answer("candidate", "later")}
    report = evaluation.gate(answers=others)
    assert report.state is GateState.INVALID
    assert "grade graded other answers of candidate" in report.reasons[0]


def more(evaluation: Evaluation, judge: JudgeCanary | None = None, **of_candidate: Any) -> dict[str, Any]:
    asked = tuple(
        Prompt.build(prompt.messages, source="more", tags=prompt.tags).model_copy(update={"id": f"m{n}"})
        for n, prompt in enumerate(PROMPTS)
    )
    prompts = evaluation.publish("reserve", {}, lambda out: write_jsonl(out / "prompts.jsonl", asked))
    made: dict[PolicyName, Path] = {
        policy: evaluation.answer(policy, "more", prompts_sha256="r", **(of_candidate if policy == "candidate" else {}))
        for policy in POLICIES
    }
    return {
        "more_prompts": prompts,
        "more_answers": made,
        "more_grades": evaluation.grade("grade_more", made, asked, judge),
        "looks": 2,
    }


def test_a_top_up_doubles_the_evaluation_and_halves_alpha(evaluation: Evaluation) -> None:
    report = evaluation.gate(**more(evaluation))
    assert report.state is GateState.PASS
    assert report.topped_up
    assert report.checks[0].num_prompts == 400
    assert "97.5 %" in report.checks[0].why


def test_a_top_up_that_was_served_otherwise_is_invalid(evaluation: Evaluation) -> None:
    report = evaluation.gate(**more(evaluation, versions={"vllm": "0.33.0"}))
    assert report.state is GateState.INVALID
    assert "versions.vllm" in report.reasons[0]


def test_the_worse_judge_canary_of_the_two_counts(evaluation: Evaluation) -> None:
    report = evaluation.gate(**more(evaluation, judge=canary(20)))
    assert report.state is GateState.INVALID
    assert report.judge_canary is not None
    assert report.judge_canary.num_right == 20


@pytest.mark.parametrize("where", ["rounds", "demonstrations"])
def test_what_was_trained_on_is_compared_with_all_evaluation_prompts(evaluation: Evaluation, where: str) -> None:
    asked = PROMPTS[7].text
    trained = Prompt.build((Message(role="user", content=asked.upper()),), source="pool")
    rounds = evaluation.publish("trained", {}, lambda out: write_jsonl(out / "prompts.jsonl", [trained]))
    demonstrations = evaluation.path / "demonstrations.jsonl"
    turns = '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "%s"}, {"role": "assistant", "content": "a"}]}\n'
    write_text(demonstrations, turns % asked)
    inputs = {"trained": (rounds, rounds)} if where == "rounds" else {"demonstrations": demonstrations}
    report = evaluation.gate(held_out=(evaluation.evalset,), **inputs)
    assert report.state is GateState.INVALID
    assert (
        f"1 of 600 evaluation prompts are (nearly) among those that this run has trained on, above max_contaminated 0.0 % ({PROMPTS[7].id})"
        in report.reasons[0]
    )
