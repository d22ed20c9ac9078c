"""A round begins once, ends once, and promotes by one atomic write that any crash leaves healable."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from pathlib import Path

import pytest

from dpo_loop.errors import BusyError, CorruptArtifactError, InputError
from dpo_loop.files import write_json
from dpo_loop.layout import RunDir
from dpo_loop.types import CheckResult, GateState
from flows.approval import decide
from flows.failures import StageFailure
from flows.inputs import pinned_parent, top_up_of
from flows.rounds import (
    RoundState,
    Stop,
    begin_round,
    current_policy,
    exit_code,
    finish_round,
    lease,
    next_round,
    read_round,
    state_of,
    stop_reason,
    verify_rounds,
)
from flows.steps import invalid_reasons, plan, planned_stages, read_run_config
from flows.summary import history_for_report, row_of
from tests.flows.runs import POLICY, gate_report, judged_round, played_round, publish, publish_policy, started_run, trained_policy


def test_round_0_blesses_the_start_policy(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    assert current_policy(run).policy.key == POLICY.key
    assert read_round(run, 0).promoted
    assert run.current.read_text() == run.round(0).blessing.read_text()


def test_a_pass_promotes_the_candidate_and_the_next_round_starts_from_it(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    begin_round(run, 2)
    assert pinned_parent(run, 2).policy.key == trained_policy(1).key
    assert pinned_parent(run, 2).round == 1


@pytest.mark.parametrize("state", [GateState.FAIL, GateState.INVALID])
def test_anything_else_keeps_the_previous_policy(tmp_path: Path, state: GateState) -> None:
    run = started_run(tmp_path)
    before = run.current.read_bytes()
    played_round(run, 1, state)
    assert run.current.read_bytes() == before
    assert not run.round(1).blessing.exists()
    begin_round(run, 2)
    assert pinned_parent(run, 2).policy.key == POLICY.key


def test_a_crash_between_blessing_and_pointer_heals(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    start = run.current.read_text()
    played_round(run, 1, GateState.PASS)
    promoted, blessing = run.current.read_text(), run.round(1).blessing.read_text()
    run.current.write_text(start)  # as a crash after the blessing leaves it
    run.round(1).manifest.unlink()
    assert current_policy(run).round == 0
    finish_round(run, 1)
    assert run.current.read_text() == promoted
    assert run.round(1).blessing.read_text() == blessing


def test_a_crash_after_the_pointer_heals_and_the_parent_stays_pinned(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    run.round(1).manifest.unlink()
    assert pinned_parent(run, 1).round == 0
    assert state_of(run, 1) is RoundState.PLAYING
    assert finish_round(run, 1).promoted
    assert pinned_parent(run, 1).round == 0


def test_ending_a_round_twice_changes_nothing(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    finish_round(run, 1)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_a_checkpoint_that_changed_after_grading_is_not_promoted(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.PASS)
    path = run.round(1).stage("train") / "policy.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CorruptArtifactError, match="has changed since stage train"):
        finish_round(run, 1)
    assert current_policy(run).round == 0


def test_a_round_cannot_begin_before_the_last_one_ended(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.PASS)
    with pytest.raises(InputError, match="round 1 has not ended"):
        begin_round(run, 2)
    assert next_round(run) == 1


def test_the_loop_stops_when_rounds_are_played_and_after_failures_in_a_row(tmp_path: Path) -> None:
    run = started_run(tmp_path, rounds=3, max_consecutive_failures=2)
    config = read_run_config(run)
    assert stop_reason(run, config) is None
    played_round(run, 1, GateState.FAIL)
    assert stop_reason(run, config) is None
    played_round(run, 2, GateState.INVALID)
    assert stop_reason(run, config) is Stop.FAILURES
    assert exit_code(run, config) == 13
    patient = config.model_copy(update={"max_consecutive_failures": 3})
    assert stop_reason(run, patient) is None
    played_round(run, 3, GateState.PASS)
    assert stop_reason(run, patient) is Stop.ROUNDS_PLAYED
    assert exit_code(run, patient) == 0


def test_the_loop_stops_when_the_prompts_are_used_up(tmp_path: Path) -> None:
    pool = {"kind": "jsonl", "path": "world:pool.jsonl"}
    run = started_run(tmp_path, prompts={"pool": pool, "num_buckets": 1}, rounds=5)
    config = read_run_config(run)
    played_round(run, 1, GateState.PASS)
    assert stop_reason(run, config) is Stop.PROMPTS_USED_UP
    cycling = config.model_copy(update={"prompts": config.prompts.model_copy(update={"reuse": "cycle"})})
    assert stop_reason(run, cycling) is None


def test_an_interrupted_round_goes_on_whatever_the_stop_rules_say(tmp_path: Path) -> None:
    run = started_run(tmp_path, rounds=1)
    judged_round(run, 1, GateState.PASS)
    assert stop_reason(run, read_run_config(run)) is None


def test_the_reason_of_an_invalid_round_reaches_the_gate(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    begin_round(run, 1)
    here = run.round(1)
    here.failure("pair").parent.mkdir()
    failure = StageFailure(kind="NoPairsError", message="8 ties", exit_code=13, retryable=False, failed_at="now")
    write_json(here.failure("pair"), failure)
    assert invalid_reasons(run, 1) == ("pair: 8 ties",)
    stage, inputs = plan(run, 1, "gate")
    assert stage.name == "gate"
    assert inputs["reasons"] == ("pair: 8 ties",)
    assert inputs["candidate"] is None
    publish(here.stage("pair"), {"pairs.jsonl": "{}\n"})  # tried again, with luck
    assert invalid_reasons(run, 1) == ()


def test_an_outage_is_not_an_invalid_round(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    begin_round(run, 1)
    here = run.round(1)
    here.failure("judge").parent.mkdir()
    failure = StageFailure(kind="JudgeUnavailableError", message="503", exit_code=75, retryable=True, failed_at="now")
    write_json(here.failure("judge"), failure)
    assert invalid_reasons(run, 1) == ()


def test_previous_answers_are_those_of_the_round_that_made_the_current_policy(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    played_round(run, 2, GateState.FAIL)
    begin_round(run, 3)
    inputs = plan(run, 3, "grade")[1]
    assert inputs["previous"] == run.round(1).stage("answer")
    assert inputs["anchor"] == run.round(0).stage("answer")


def test_a_summary_says_what_was_decided_and_a_report_what_the_gate_said(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    judged_round(run, 2, GateState.NEEDS_REVIEW)
    before = history_for_report(run, 2)
    decide(run, 2, "approve", reviewer="ann", reason="looked at it")
    finish_round(run, 2)
    assert [row.promoted for row in before] == [True, True, False]
    assert history_for_report(run, 2) == before  # a report made again has the same key
    assert row_of(run, 2).promoted
    assert row_of(run, 2).parent == trained_policy(1).key


def test_a_flipped_byte_in_any_round_is_found(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    assert verify_rounds(run, [0, 1]) == 4
    run.round(1).report_page.write_bytes(run.round(1).report_page.read_bytes().replace(b"round", b"Round", 1))
    with pytest.raises(CorruptArtifactError, match=r"report\.html has changed"):
        verify_rounds(run, [0, 1])


def _hold(path: str, held: object, done: object) -> None:
    with lease(RunDir(Path(path))):
        held.set()  # type: ignore[attr-defined]
        done.wait(30)  # type: ignore[attr-defined]


def test_two_processes_cannot_play_one_run(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), held, done))
    other.start()
    try:
        assert held.wait(30)
        with pytest.raises(BusyError, match=f"pid {other.pid}"), lease(RunDir(tmp_path), wait_s=0):
            pass
    finally:
        done.set()
        other.join()
    with lease(RunDir(tmp_path), wait_s=0), lease(RunDir(tmp_path), wait_s=0):
        assert json.loads(RunDir(tmp_path).lease.read_text()) > 0


def test_a_candidate_that_the_gate_did_not_judge_is_not_promoted(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.PASS)
    train = run.round(1).stage("train")
    shutil.rmtree(train)
    publish_policy(train, trained_policy(7))
    with pytest.raises(CorruptArtifactError, match="its gate judged another candidate"):
        finish_round(run, 1)
    assert current_policy(run).round == 0


def topped_up(run: RunDir, state: GateState, check: GateState) -> None:
    """Round 1 of a run with a reserve, whose first look is published."""
    begin_round(run, 1)
    report = gate_report(1, state)
    result = CheckResult(
        id="x", metric="pass_rate", rule="floor", vs=None, num_prompts=9, value=0.5, reference=None, delta=None, ci_low=0.1, ci_high=0.9,
        margin=0.4, state=check, why="x",
    )  # fmt: skip
    publish(run.round(1).stage("look"), {"gate_report.json": report.model_copy(update={"checks": (result,)}).model_dump_json()})


RESERVE = {"prompts": {"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}, "eval_reserve": 0.3}}


@pytest.mark.parametrize(
    ("state", "check", "asked"),
    [
        (GateState.INCONCLUSIVE, GateState.INCONCLUSIVE, True),
        (GateState.NEEDS_REVIEW, GateState.INCONCLUSIVE, True),
        (GateState.NEEDS_REVIEW, GateState.NEEDS_REVIEW, False),
        (GateState.FAIL, GateState.INCONCLUSIVE, False),
        (GateState.INVALID, GateState.INCONCLUSIVE, False),
        (GateState.INCONCLUSIVE, GateState.PASS, False),
        (GateState.PASS, GateState.PASS, False),
    ],
)
def test_the_reserve_is_asked_where_evidence_is_all_that_is_missing(
    tmp_path: Path, state: GateState, check: GateState, asked: bool
) -> None:
    run = started_run(tmp_path, **RESERVE)
    topped_up(run, state, check)
    publish_policy(run.round(1).stage("train"), trained_policy(1))
    assert bool(top_up_of(run, 1, read_run_config(run))) is asked
    assert ("grade_more" in planned_stages(run, 1)) is asked
    if not asked:
        with pytest.raises(InputError, match="needs no more_candidate"):
            plan(run, 1, "more_candidate")


def test_with_a_reserve_nothing_is_decided_before_the_first_look(tmp_path: Path) -> None:
    run = started_run(tmp_path, **RESERVE)
    begin_round(run, 1)
    publish_policy(run.round(1).stage("train"), trained_policy(1))
    with pytest.raises(InputError, match="look comes first"):
        plan(run, 1, "gate")


def test_nothing_is_promoted_over_a_gate_report_that_was_changed_afterwards(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.FAIL)
    judged_round(run, 2, GateState.PASS)
    run.round(1).gate_report.write_text(gate_report(1, GateState.PASS).model_dump_json())
    with pytest.raises(CorruptArtifactError, match="cannot be promoted"):
        finish_round(run, 2)
    assert current_policy(run).round == 0
