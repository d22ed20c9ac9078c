"""What is wrong or odd about the judges of a config, before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.judge_checks import warnings
from flows.paths import resolve_paths
from flows.preflight import preflight
from flows.progress import redactor
from tests.flows.runs import raw_config, small_config

KEY = "JUDGE_TEST_KEY"
GATE = {"checks": [{"id": "harm", "metric": "harmful_rate", "rule": "ceiling", "margin": 0.1}]}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "sk-a-long-secret")


def remote(model: str = "m", **settings: Any) -> dict[str, Any]:
    return {"kind": "openai", "model": model, "api_key_env": KEY, "family": "gpt", "free": True, **settings}


def judge_problems(folder: Path, judge: dict[str, Any], **changes: Any) -> list[str]:
    return [line for line in preflight(small_config(folder / "run", judge=judge, **changes)) if line.startswith("judge")]


def test_a_price_nobody_knows_is_told_before_the_run_with_the_ways_out(tmp_path: Path) -> None:
    [problem] = judge_problems(tmp_path, remote(free=False))
    assert problem.startswith("judge.model: the price of m is not known")
    assert "free: true" in problem
    assert judge_problems(tmp_path, remote("gpt-5-mini", free=False)) == []


def test_each_judge_of_a_panel_is_checked_under_its_own_key(tmp_path: Path) -> None:
    other = remote("n", family="claude", free=False, api_key_env="ABSENT_KEY", rubric="kindness")
    problems = judge_problems(tmp_path, {"kind": "panel", "judges": [remote(), other]})
    assert [line.partition(": ")[0] for line in problems] == [f"judge.judges.1.{key}" for key in ("api_key_env", "rubric", "model")]


def test_a_reward_model_that_is_nowhere_is_told(tmp_path: Path) -> None:
    [problem] = judge_problems(tmp_path, {"kind": "reward_model", "model": str(tmp_path / "none")})
    assert problem.startswith("judge.model: ")


def test_weights_that_run_batch_is_to_run_are_looked_for_and_no_key_is(tmp_path: Path) -> None:
    judge = {"kind": "vllm_run_batch", "model": "mine", "weights": str(tmp_path / "none")}
    [problem] = judge_problems(tmp_path, judge)
    assert problem.startswith("judge.weights: ")
    assert judge_problems(tmp_path, judge | {"weights": str(tmp_path)}) == []
    assert redactor(small_config(tmp_path / "run", judge=judge))("a word") == "a word"


def test_a_judge_of_the_policy_s_own_family_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))
    start = {"kind": "model", "model": str(tmp_path)}

    def warned(judge: dict[str, Any]) -> list[str]:
        return warnings(small_config(tmp_path / "run", judge=judge, start=start))

    [line] = warned(remote("Qwen/Qwen3-235B", family=""))
    assert line.startswith("judge: Qwen/Qwen3-235B is of the policy's own family (qwen)")
    assert len(warned({"kind": "panel", "judges": [remote(), remote("x", family="Qwen")]})) == 1
    assert warned(remote("gpt-5-mini")) == []
    assert warnings(small_config(tmp_path / "run", judge=remote("Qwen3"))) == []


def test_every_key_of_a_panel_is_kept_off_the_screen(tmp_path: Path) -> None:
    config = small_config(tmp_path / "run", judge={"kind": "panel", "judges": [remote(), remote("n", family="claude")]})
    assert redactor(config)("Bearer sk-a-long-secret") == "Bearer ***"


def test_files_of_judges_are_found_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    judges = [
        remote(rubric="mine.md"),
        {"kind": "reward_model", "model": "reward", "family": "llama"},
        {"kind": "vllm_run_batch", "model": "mine", "weights": "./reward", "family": "qwen"},
    ]
    config = small_config(tmp_path / "run", judge={"kind": "panel", "judges": judges})
    told = resolve_paths(config).judge.model_dump()["judges"]
    assert (told[0]["rubric"], told[1]["model"]) == (str(tmp_path / "mine.md"), str(tmp_path / "reward"))
    assert told[2]["weights"] == str(tmp_path / "reward")
    assert raw_config(tmp_path / "run")["judge"]["kind"] == "verifier"


def test_the_gate_may_not_ask_the_judge_whose_preferences_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEY", "a-long-secret-key")
    judge = {"kind": "openai_compatible", "model": "big", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "KEY", "free": True}
    guard = {"kind": "guard", "format": "wildguard", "model": "other", "base_url": "http://127.0.0.1:9/v1", "api_key_env": "KEY"}
    for safety, problems in (
        ({"kind": "judge", "judge": judge}, ["grading.safety.judge: big also decides preferences"]),
        (
            {"kind": "by_side", "harmful": guard, "benign": {"kind": "judge", "judge": judge}},
            ["grading.safety.benign.judge: big also"],
        ),
        (guard, []),
    ):
        found = preflight(small_config(tmp_path, judge=judge, grading={"safety": safety}, gate=GATE))
        assert [line[: len(start)] for line, start in zip(found, problems, strict=True)] == problems


def test_keys_rubrics_and_weights_of_safety_judges_are_checked_and_kept_off_the_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = {
        "kind": "openai_compatible",
        "model": "m",
        "base_url": "http://127.0.0.1:9/v1",
        "api_key_env": "SAFETY_KEY",
        "free": True,
    }
    safety = {"kind": "judge", "judge": {**judge, "rubric": "mine.md"}}
    found = preflight(small_config(tmp_path, grading={"safety": safety}, gate=GATE))
    assert any(line.startswith("grading.safety.judge.api_key_env: the environment variable SAFETY_KEY") for line in found)
    assert any(line.startswith("grading.safety.judge.rubric: ") for line in found)
    monkeypatch.setenv("SAFETY_KEY", "a-long-secret-key")
    assert redactor(small_config(tmp_path, grading={"safety": safety}, gate=GATE))("with a-long-secret-key") == "with ***"
    resolved = resolve_paths(small_config(tmp_path, grading={"safety": safety}, gate=GATE))
    assert Path(resolved.grading.safety.model_dump()["judge"]["rubric"]).is_absolute()
