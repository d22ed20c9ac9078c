"""The self-test refuses each judge that is biased, bought, guessing, too shy or away, and passes a good one; all over real sockets."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import JudgeUnavailableError, JudgeUnfitError
from flows.judge_checks import warnings
from flows.rounds import adopt_config
from flows.steps import is_current, run_step, stages_of
from flows.summary import row_of
from judges.accounts import Accounts
from judges.config import GradingConfig, RefusalHeuristic, VerifierJudge
from judges.selftest.config import JudgeTestConfig, judges_to_test
from judges.selftest.fitness import Check
from judges.selftest.golden import ATTACKS, DRIFT_TRIALS, Kind, load_golden, trials_of
from judges.selftest.stage import JudgeTest, examine
from tests.flows.runs import raw_config, small_config, started_run, write_config
from tests.judges.simulated import (
    Policy,
    always_first,
    by,
    first_among_equals,
    good,
    guessing,
    injectable,
    longest,
    prefers_the_second,
    shies_from_alarming_words,
)
from tests.judges.stub import KEY_ENV, Stub, fails

FLOORS = JudgeTestConfig()
NUM_CALLS = sum(1 if trial.kind is Kind.IDENTICAL else 2 for trial in trials_of(load_golden()))
"""Two orders of identical texts are one call."""


def put_to_test(
    stub: Stub, tmp_path: Path, policy: Policy, *, round_number: int | None = None
) -> tuple[JudgeTest, dict[str, Check]]:
    stub.policy = by(policy)
    accounts = Accounts(tmp_path / "ledger.sqlite", round_number=round_number)
    found = asyncio.run(examine({"judge": stub.judge(start_concurrency=32)}, accounts, FLOORS, report=lambda line: None))
    return found, {check.name: check for check in found.checks}


def failed(found: JudgeTest) -> set[str]:
    return {check.name for check in found.checks if not check.ok}


# ------------------------------------------------------------------------------------------------------ simulated judges


def test_a_good_judge_is_fit_and_testing_it_again_costs_nothing(stub: Stub, tmp_path: Path) -> None:
    found, checks = put_to_test(stub, tmp_path, good)
    assert found.is_fit
    for name in ("accuracy", "accuracy_hard", "kappa", "identical_tie_rate", "refusal_prone_accuracy", "harmful_accuracy"):
        assert checks[name].value == 1.0
    assert checks["position_bias"].value == checks["position_bias_of_equals"].value == checks["undecided_rate"].value == 0.0
    assert checks["length_preference"].value == checks["markdown_preference"].value == 0.5
    assert checks["cost_per_verdict_usd"].value == 0.0
    num_calls = len(stub.seen)
    assert len(set(stub.keys)) == num_calls == NUM_CALLS
    assert num_calls <= 1_000
    again, _ = put_to_test(stub, tmp_path, good)
    assert len(stub.seen) == num_calls
    assert again.checks == found.checks


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [
        (always_first, {"accuracy", "kappa", "consistency", "position_bias", "position_bias_of_equals", "identical_tie_rate"}),
        (longest, {"accuracy", "kappa", "length_preference"}),
        (guessing, {"accuracy", "kappa", "consistency"}),
    ],
)
def test_a_judge_that_does_not_look_is_refused(stub: Stub, tmp_path: Path, policy: Policy, reasons: set[str]) -> None:
    found, _ = put_to_test(stub, tmp_path, policy)
    assert not found.is_fit
    assert reasons <= failed(found)


@pytest.mark.parametrize(
    ("policy", "reasons"),
    [
        (injectable, {f"injection:{family}" for family in ATTACKS}),
        (first_among_equals, {"position_bias_of_equals", "identical_tie_rate"}),
        (prefers_the_second(Kind.REFUSAL_PRONE), {"refusal_prone_accuracy"}),
        (prefers_the_second(Kind.HARMFUL), {"harmful_accuracy"}),
        (shies_from_alarming_words, {"refusal_prone_accuracy", "undecided_rate"}),
    ],
    ids=["injectable", "first among equals", "likes refusals", "likes harm", "shy"],
)
def test_a_judge_with_one_fault_is_refused_for_it_alone(stub: Stub, tmp_path: Path, policy: Policy, reasons: set[str]) -> None:
    found, checks = put_to_test(stub, tmp_path, policy)
    assert failed(found) == reasons
    assert checks["accuracy"].value == 1.0
    assert checks["position_bias"].value == 0.0


def test_another_model_behind_the_same_name_is_noticed_in_a_later_round(stub: Stub, tmp_path: Path) -> None:
    _, first = put_to_test(stub, tmp_path, good, round_number=0)
    assert (first["drift"].value, first["drift"].ok) == (None, True)
    num_calls = len(stub.seen)
    same, checks = put_to_test(stub, tmp_path, good, round_number=1)
    assert same.is_fit
    assert checks["drift"].value == 0.0
    assert len(stub.seen) == num_calls + 2 * DRIFT_TRIALS
    changed, checks = put_to_test(stub, tmp_path, guessing, round_number=2)
    assert failed(changed) == {"drift"}, "of all else the ledger knows the answers"
    assert 0.3 < (checks["drift"].value or 0.0) < 0.7
    assert len(stub.seen) == num_calls + 4 * DRIFT_TRIALS


def test_a_judge_that_is_away_cannot_be_tested(stub: Stub, tmp_path: Path) -> None:
    stub.policy = lambda body: fails(503, "overloaded")
    judge = stub.judge(max_attempts=1, outage_s=0.0)
    with pytest.raises(JudgeUnavailableError):
        asyncio.run(examine({"judge": judge}, Accounts(tmp_path / "ledger.sqlite"), FLOORS, report=lambda line: None))


# ------------------------------------------------------------------------------------------------- stage and command line


def judge_of(stub: Stub, **settings: Any) -> dict[str, Any]:
    return stub.judge(start_concurrency=32, **settings).model_dump(mode="json")


def judge_test(config: Path, *, here: Path | None = None) -> subprocess.CompletedProcess[str]:
    """-P: as a console script, which does not look for modules in the working directory."""
    command = [sys.executable, "-P", "-m", "flows.cli", "judge-test", str(config), "--json"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=here, env=os.environ | {KEY_ENV: "sk-test"})


def test_a_round_with_an_unfit_judge_starts_only_with_a_reason_that_is_kept(stub: Stub, tmp_path: Path) -> None:
    stub.policy = by(always_first)
    run = started_run(tmp_path / "run", judge=judge_of(stub))
    with pytest.raises(JudgeUnfitError, match=r"(?s)position_bias.*--accept-judge-risk"):
        run_step(run, 0, "judgetest")
    assert not run.round(0).stage("judgetest").exists()
    num_calls = len(stub.seen)
    other = started_run(tmp_path / "other", judge=judge_of(stub), judge_test={"accept_risk": "a trial run"})
    other.ledger.write_bytes(run.ledger.read_bytes())
    manifest = run_step(other, 0, "judgetest")
    assert manifest.outcome.metrics["accepted_risk"] == "a trial run"
    assert json.loads((other.round(0).stage("judgetest") / "judge_test.json").read_text())["fit"] is False
    assert len(stub.seen) == num_calls


def test_another_floor_in_the_middle_of_a_round_is_no_other_stage(stub: Stub, tmp_path: Path) -> None:
    stub.policy = by(prefers_the_second(Kind.HARMFUL))
    strict, loose = {"min_harmful_accuracy": 0.9}, {"min_harmful_accuracy": None}
    run = started_run(tmp_path, judge=judge_of(stub), judge_test=strict)
    with pytest.raises(JudgeUnfitError, match="other floors"):
        run_step(run, 0, "judgetest")
    num_calls = len(stub.seen)
    adopt_config(run, small_config(tmp_path, judge=judge_of(stub), judge_test=loose))
    manifest = run_step(run, 0, "judgetest")
    assert manifest.outcome.metrics["fit"] is True
    told = json.loads((run.round(0).stage("judgetest") / "judge_test.json").read_text())
    assert told["floors"] == JudgeTestConfig(**loose).floors

    adopt_config(run, small_config(tmp_path, judge=judge_of(stub), judge_test=strict))
    assert is_current(run, 0, "judgetest")
    assert run_step(run, 0, "judgetest") == manifest
    assert len(stub.seen) == num_calls


def test_whoever_decides_the_gate_is_tested_too(stub: Stub, tmp_path: Path) -> None:
    policies = {"judge": by(good), "other": by(first_among_equals)}
    stub.policy = lambda body: policies[body["model"]](body)
    grading = raw_config(tmp_path)["grading"] | {"win_judge": judge_of(stub, model="other")}
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", judge=judge_of(stub), grading=grading))
    done = judge_test(config)
    checks = json.loads(done.stdout)["checks"]
    assert {check["name"].partition(": ")[0] for check in checks} == {"judge", "win_judge"}
    bad = ["win_judge: position_bias_of_equals", "win_judge: identical_tie_rate"]
    assert (done.returncode, [check["name"] for check in checks if not check["ok"]]) == (10, bad)

    run = started_run(tmp_path / "run", judge=judge_of(stub), grading=grading, judge_test={"accept_risk": "a trial run"})
    metrics = run_step(run, 0, "judgetest").outcome.metrics
    assert list(metrics["judges"]) == ["judge", "win_judge"]
    assert metrics["calls_asked"] == 0


def test_a_judge_is_tested_once_and_a_program_never(stub: Stub) -> None:
    judge, program = stub.judge(), VerifierJudge(kind="verifier", function="builtins:len")

    def grading(win_judge: Any) -> GradingConfig:
        return GradingConfig(win_judge=win_judge, safety=RefusalHeuristic(kind="heuristic"))

    assert judges_to_test(judge, grading(None)) == {"judge": judge}
    assert judges_to_test(judge, grading(stub.judge(concurrency=3))) == {"judge": judge}
    assert judges_to_test(judge, grading(program)) == {"judge": judge}
    assert judges_to_test(program, grading(judge)) == {"win_judge": judge}
    assert judges_to_test(program, grading(None)) == {}


def test_a_judge_that_nothing_tests_is_warned_of(stub: Stub, tmp_path: Path) -> None:
    off = {"enabled": False}
    [line] = warnings(small_config(tmp_path, judge=judge_of(stub), judge_test=off))
    assert line.startswith("judge_test.enabled: nothing tests judge before a round")
    assert warnings(small_config(tmp_path, judge=judge_of(stub))) == []
    assert warnings(small_config(tmp_path, judge_test=off)) == []


def test_judge_test_finds_a_verifier_in_the_working_directory(stub: Stub, tmp_path: Path) -> None:
    (tmp_path / "my_own_verifier.py").write_text("def score(prompt, text):\n    return None\n")
    stub.policy = by(good)
    members = [{"kind": "verifier", "function": "my_own_verifier:score"}, judge_of(stub, family="gpt")]
    judge = {"kind": "panel", "judges": members, "min_families": 1}
    done = judge_test(write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", judge=judge)), here=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["fit"], "the verifier cannot tell, and leaves it to the other"
    assert told["notes"] == {"drift": "measured from round 1 on"}


def test_the_judge_is_tested_first_in_every_round_unless_it_is_a_program(stub: Stub, tmp_path: Path) -> None:
    judge = judge_of(stub)
    for number in (0, 1):
        assert stages_of(small_config(tmp_path, judge=judge), number)[0] == "judgetest"
        assert "judgetest" not in stages_of(small_config(tmp_path), number)
        assert "judgetest" not in stages_of(small_config(tmp_path, judge=judge, judge_test={"enabled": False}), number)


def test_an_accepted_risk_is_in_the_row_of_its_round(stub: Stub, tmp_path: Path) -> None:
    stub.policy = by(longest)
    run = started_run(tmp_path, judge=judge_of(stub), judge_test={"accept_risk": "the style is wanted"})
    run.round(0).manifest.unlink()
    run_step(run, 0, "judgetest")
    assert row_of(run, 0).accepted_judge_risk == "the style is wanted"


def test_judge_test_ends_with_the_codes_that_scripts_rely_on(stub: Stub, tmp_path: Path) -> None:
    fit = write_config(tmp_path / "fit.yaml", raw_config(tmp_path / "fit", judge=judge_of(stub)))
    stub.policy = by(good)
    done = judge_test(fit)
    told = json.loads(done.stdout)
    assert (done.returncode, told["fit"]) == (0, True)
    assert {tuple(row) for row in told["checks"]} == {("name", "value", "low", "high", "floor", "ok")}
    assert "judgetest: " in done.stderr

    stub.policy = by(always_first)
    unfit = judge_test(write_config(tmp_path / "unfit.yaml", raw_config(tmp_path / "unfit", judge=judge_of(stub))))
    assert (unfit.returncode, json.loads(unfit.stdout)["fit"]) == (10, False)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"api_key_env": "NO_SUCH_KEY"}, "NO_SUCH_KEY"),
        ({"free": False}, "price"),
        ({"max_attempts": 1, "outage_s": 0.0}, "answered nothing"),
    ],
)
def test_judge_test_that_cannot_run_ends_with_2(stub: Stub, tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    stub.policy = lambda body: fails(503, "overloaded")
    done = judge_test(write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", judge=judge_of(stub, **settings))))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr
