"""A person decides about one report, once, and only where the gate could not."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_loop.artifacts import sha256_file
from dpo_loop.errors import DecisionError, InputError
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState
from flows.approval import decide, decision_of
from flows.rounds import RoundState, Stop, current_policy, exit_code, finish_round, state_of, stop_reason
from flows.steps import read_run_config
from tests.flows.runs import judged_round, played_round, started_run


def cli(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, check=False)


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Round 1 waits for a person."""
    run = started_run(tmp_path / "run")
    judged_round(run, 1, GateState.NEEDS_REVIEW)
    return run


def test_a_round_that_needs_a_person_waits_and_promotes_nothing(run: RunDir) -> None:
    assert state_of(run, 1) is RoundState.WAITING
    assert stop_reason(run, read_run_config(run)) is Stop.WAITING
    assert exit_code(run, read_run_config(run)) == 12
    with pytest.raises(InputError, match="waits for a person"):
        finish_round(run, 1)
    assert current_policy(run).round == 0


def test_the_command_line_approves_and_the_round_ends_promoted(run: RunDir) -> None:
    ended = cli("approve", str(run.path), "1", "--reviewer", "ann", "--reason", "read the samples")
    assert (ended.returncode, ended.stderr) == (0, "")
    manifest = finish_round(run, 1)
    assert manifest.promoted
    assert manifest.decision is not None
    assert manifest.decision.reviewer == "ann"
    assert current_policy(run).round == 1
    assert current_policy(run).decision == manifest.decision
    assert manifest.decision.report_sha256 == sha256_file(run.round(1).gate_report)


def test_a_rejection_keeps_the_policy(run: RunDir) -> None:
    decide(run, 1, "reject", reviewer="ann", reason="worse tone")
    assert not finish_round(run, 1).promoted
    assert current_policy(run).round == 0


def test_a_second_decision_is_refused_and_the_first_stays(run: RunDir) -> None:
    decide(run, 1, "reject", reviewer="ann", reason="no")
    with pytest.raises(DecisionError, match="already decided: reject by ann"):
        decide(run, 1, "approve", reviewer="bob", reason="yes")
    kept = decision_of(run, 1)
    assert kept is not None
    assert kept.decision == "reject"


@pytest.mark.parametrize("state", [GateState.PASS, GateState.FAIL, GateState.INVALID])
def test_other_states_do_not_wait_for_a_person(tmp_path: Path, state: GateState) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, state)
    with pytest.raises(DecisionError, match=f"round 1 is {state.value}"):
        decide(run, 1, "approve", reviewer="ann", reason="please")
    assert not (run.path / "approvals").exists()


def test_a_changed_report_cannot_be_decided(run: RunDir) -> None:
    path = run.round(1).gate_report
    path.write_text(path.read_text().replace("NEEDS_REVIEW", "INCONCLUSIVE"))
    ended = cli("approve", str(run.path), "1", "--reviewer", "ann", "--reason", "fine")
    assert ended.returncode == 2
    assert "not the one that the gate wrote" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_decision_does_not_move_to_another_report(run: RunDir) -> None:
    decided = decide(run, 1, "approve", reviewer="ann", reason="fine")
    finish_round(run, 1)
    judged_round(run, 2, GateState.NEEDS_REVIEW)
    shutil.copy(run.approval(decided.report_sha256), run.approval(sha256_file(run.round(2).gate_report)))
    with pytest.raises(DecisionError, match="decides about another report"):
        decision_of(run, 2)


def test_a_round_that_was_not_waited_for_cannot_be_decided_later(run: RunDir) -> None:
    assert not finish_round(run, 1, review_timed_out=True).promoted
    with pytest.raises(DecisionError, match="has ended"):
        decide(run, 1, "approve", reviewer="ann", reason="late")


@pytest.mark.parametrize(("reviewer", "reason"), [("a", "fine"), ("ann", ""), ("  ", "fine"), ("ann", "  ")])
def test_a_decision_names_a_reviewer_and_a_reason(run: RunDir, reviewer: str, reason: str) -> None:
    with pytest.raises(DecisionError, match="incomplete"):
        decide(run, 1, "approve", reviewer=reviewer, reason=reason)
    assert state_of(run, 1) is RoundState.WAITING


def test_a_round_without_a_gate_report_cannot_be_decided(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    for round_number in (0, 2):
        with pytest.raises(DecisionError, match="no gate report"):
            decide(run, round_number, "approve", reviewer="ann", reason="fine")
