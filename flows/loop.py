"""The loop as Prefect flows. `play_round` is the picture of a round; every call may be made again after any crash, since what is done is
on disk. Prefect schedules, shows and retries; if its server forgets or lies, nothing is lost.
"""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed

from dpo_loop.artifacts import read_manifest
from dpo_loop.errors import InvalidRoundError
from dpo_loop.layout import JUDGE_TEST, RunDir
from flows.approval import decision_of, how_to_decide
from flows.artifacts import publish_round
from flows.config import ConfigFile, RunConfig, apply_overrides, read_raw
from flows.inputs import is_published, top_up_of
from flows.judge_checks import refuse_unfit_grader
from flows.preflight import check
from flows.progress import Event, tell
from flows.rounds import (
    RoundState,
    Stop,
    adopt_config,
    begin_round,
    finish_round,
    is_made,
    lease,
    next_round,
    state_of,
    stop_reason,
)
from flows.steps import read_run_config, stages_of
from flows.summary import row_of, write_index_page
from flows.tasks import run_stage

REVIEW_POLL_S = 2.0


@flow(name="dpo-loop", flow_run_name="{config.label}", persist_result=False)
def run_loop(config: RunConfig | ConfigFile, overrides: tuple[str, ...] = ()) -> State[Any]:
    """Play rounds until a stop rule says stop.

    overrides: `a.b=c`, as `--set` on the command line. Raises ConfigError with every problem, BusyError if another process plays this
    run.
    """
    run, config = open_run(config, overrides)
    with lease(run):
        adopt_config(run, config)
        while (stop := stop_reason(run, config)) is None:
            play_round(config.run_id, str(run.path), next_round(run))
    return Completed(name="Waiting" if stop is Stop.WAITING else "Completed", message=stop.value)


@flow(name="dpo-next-round", flow_run_name="{config.label}-next", persist_result=False)
def play_next_round(config: RunConfig | ConfigFile, overrides: tuple[str, ...] = ()) -> State[Any]:
    """Play one more round, after round 0 where that is still to be done; whatever the stop rules say."""
    run, config = open_run(config, overrides)
    with lease(run):
        adopt_config(run, config)
        if next_round(run) == 0:
            play_round(config.run_id, str(run.path), 0)
        number = next_round(run)
        play_round(config.run_id, str(run.path), number)
    return Completed(message=f"round {number}: {row_of(run, number).gate}")


def open_run(config: RunConfig | ConfigFile, overrides: tuple[str, ...]) -> tuple[RunDir, RunConfig]:
    raw = read_raw(Path(config.file)) if isinstance(config, ConfigFile) else config.model_dump(mode="json")
    whole = check(apply_overrides(raw, overrides))
    return RunDir(Path(whole.run_dir)), whole


@flow(name="dpo-round", flow_run_name="{run_id}-r{round_number:03d}", persist_result=False)
def play_round(run_id: str, run_dir: str, round_number: int) -> State[Any]:  # noqa: ARG001  run_id is for the name of the flow run
    """One round from its prompts to its end. Round 0 prepares and grades the start policy."""
    run = RunDir(Path(run_dir))
    config = read_run_config(run)
    begin_round(run, round_number)

    names = stages_of(config, round_number)

    def stage(name: str) -> None:
        run_stage(config, run, round_number, name)

    if round_number == 0:
        for name in names:
            stage(name)
            if name == "grade":
                refuse_unfit_grader(run, config)
    elif not is_made(run, round_number):
        if not is_published(run, round_number, "gate"):
            try:
                if JUDGE_TEST in names:
                    stage(JUDGE_TEST)
                stage("prompts")
                stage("generate")
                stage("judge")
                stage("pair")
                stage("train")
                stage("answer")
                if "capability" in names:
                    stage("capability")
                stage("grade")
                if "look" in names:
                    stage("look")
                    for name in top_up_of(run, round_number, config):
                        stage(name)
            except InvalidRoundError as error:
                get_run_logger().warning("round %s is INVALID: %s", round_number, error)
            stage("gate")
        stage("report")

    return _end_round(run, config, round_number)


def _end_round(run: RunDir, config: RunConfig, round_number: int) -> State[Any]:
    timed_out = state_of(run, round_number) is RoundState.WAITING and not _wait_for_decision(run, config, round_number)
    if timed_out and not config.review_timeout_s:
        publish_round(run, round_number)
        state = row_of(run, round_number).gate
        return Completed(name=str(state), message=f"round {round_number} waits for a person:\n{how_to_decide(run, round_number)}")
    finish_round(run, round_number, review_timed_out=timed_out)
    write_index_page(run, config)
    publish_round(run, round_number)
    row = row_of(run, round_number)
    told = "promoted" if row.promoted else "the previous policy is kept"
    return Completed(name=str(row.gate or "Completed"), message=f"{told}. {' '.join(row.reasons)}".strip())


def _wait_for_decision(run: RunDir, config: RunConfig, round_number: int) -> bool:
    """Whether a person decided within review_timeout_s of the report. Holds no GPU: nothing but this loop runs."""
    report = read_manifest(run.round(round_number).stage("report"))
    assert report is not None
    end = datetime.fromisoformat(report.finished_at).timestamp() + config.review_timeout_s
    if config.review_timeout_s:
        tell(Event("line", round_number, "review", f"review: waits for a person until {datetime.fromtimestamp(end):%H:%M:%S}"))
        write_index_page(run, config)
        publish_round(run, round_number)
    while decision_of(run, round_number) is None:
        if time.time() >= end:
            return False
        time.sleep(REVIEW_POLL_S)
    return True
