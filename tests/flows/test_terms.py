"""The anchor moves, and checks are waived, by name and reason, for rounds that begin later."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_loop.artifacts import sha256_file
from dpo_loop.errors import DecisionError
from dpo_loop.layout import RunDir
from dpo_loop.types import CheckResult, GateState
from flows.rounds import begin_round, finish_round
from flows.steps import run_step
from flows.terms import rebase, terms_of, waive
from tests.flows.runs import gate_report, played_round, publish, publish_policy, started_run, trained_policy


def broken_round(run: RunDir, number: int) -> None:
    begin_round(run, number)
    here = run.round(number)
    publish_policy(here.stage("train"), trained_policy(number))
    checks = tuple(
        CheckResult(
            id=id, metric="harmful_rate", rule="ceiling", vs=None, num_prompts=10, value=0.5, reference=None, delta=None, ci_low=0.2,
            ci_high=0.8, margin=0.1, state=state, why=id,
        )
        for id, state in (("broken", GateState.FAIL), ("holds", GateState.PASS))
    )  # fmt: skip
    report = gate_report(number, GateState.FAIL).model_copy(update={"checks": checks})
    publish(here.stage("gate"), {"gate_report.json": report.model_dump_json()})
    run_step(run, number, "report")
    finish_round(run, number)


def test_the_anchor_moves_to_a_promoted_round_for_rounds_that_begin_later(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    begin_round(run, 2)
    move = rebase(run, 1, reviewer="Ada", reason="released")
    assert (move.before, move.round) == (0, 1)
    assert terms_of(run, 2).anchor_round == 0  # it had begun
    begin_round(run, 2)
    assert terms_of(run, 2).anchor_round == 0


def test_the_next_round_is_compared_with_the_new_anchor(tmp_path: Path) -> None:
    from flows.inputs import inputs_of
    from flows.steps import read_run_config

    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    rebase(run, 1, reviewer="Ada", reason="released")
    played_round(run, 2, GateState.PASS)
    begin_round(run, 3)
    grading = inputs_of(run, 3, "grade", read_run_config(run), ())
    assert grading["anchor"] == run.round(1).stage("answer")
    assert grading["previous"] == run.round(2).stage("answer")
    publish_policy(run.round(3).stage("train"), trained_policy(3))
    judging = inputs_of(run, 3, "gate", read_run_config(run), ())
    assert judging["anchor"].key == trained_policy(1).key
    assert judging["terms"].anchor_round == 1


def test_only_a_promoted_policy_becomes_the_anchor(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.FAIL)
    for number in (1, 7):
        with pytest.raises(DecisionError, match="was not promoted"):
            rebase(run, number, reviewer="Ada", reason="why not")
    with pytest.raises(DecisionError, match="is the anchor already"):
        rebase(run, 0, reviewer="Ada", reason="again")
    assert not run.anchors.exists()


def test_a_waiver_holds_for_the_rounds_it_names_and_no_longer(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    broken_round(run, 1)
    waiver = waive(run, 1, "broken", num_rounds=1, reviewer="Ada", reason="known")
    assert waiver.report_sha256 == sha256_file(run.round(1).gate_report)
    played_round(run, 2, GateState.PASS)
    begin_round(run, 3)
    assert [w.check_id for w in terms_of(run, 2).waivers] == ["broken"]
    assert terms_of(run, 3).waivers == ()
    assert terms_of(run, 1).waivers == ()


@pytest.mark.parametrize(
    ("check_id", "reason", "told"),
    [
        ("holds", "why", "is PASS: only a check that is broken"),
        ("none", "why", "has no check none; it has broken, holds"),
        ("broken", " ", "a reason are needed"),
    ],
)
def test_what_cannot_be_waived_is_refused(tmp_path: Path, check_id: str, reason: str, told: str) -> None:
    run = started_run(tmp_path)
    broken_round(run, 1)
    with pytest.raises(DecisionError, match=told):
        waive(run, 1, check_id, num_rounds=1, reviewer="Ada", reason=reason)
    assert not run.waivers.exists()


def test_a_round_without_a_gate_has_nothing_to_waive(tmp_path: Path) -> None:
    with pytest.raises(DecisionError, match="no gate report"):
        waive(started_run(tmp_path), 0, "x", num_rounds=1, reviewer="Ada", reason="why")
