"""One Prefect task for every stage: it starts the stage's process, passes its progress on, and says whether trying again may help."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.logging import get_run_logger
from prefect.tasks import Task

from dpo_loop.artifacts import read_manifest
from dpo_loop.errors import CorruptArtifactError, DpoLoopError, StageFailedError
from dpo_loop.layout import SAME_AS, RunDir
from flows.config import RunConfig
from flows.failures import stage_error
from flows.progress import Event, is_progress, redactor, tell
from flows.steps import is_current, read_run_config
from flows.supervise import STOPPED, StageTimeoutError, run_supervised

RETRY_DELAYS_S = [5.0, 30.0, 120.0]
SERVER_LOG_EVERY_S = 2.0
"""Lines sent to a Prefect server are rows of its database."""


def stage_command(config: RunConfig, run: RunDir, round_number: int, name: str) -> list[str]:
    python = config.stage_python.get(name) or config.stage_python.get(SAME_AS.get(name, name), sys.executable)
    return [python, "-m", "flows.cli", "step", name, "--run", str(run.path), "--round", str(round_number)]


def _trying_again_may_help(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    error = state.result(raise_on_failure=False)
    return isinstance(error, DpoLoopError) and error.retryable


# Nothing is cached or persisted by Prefect: a published stage is found on disk, by its content.
@task(
    name="stage",
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_trying_again_may_help,
)
def stage_task(run_dir: str, round_number: int, name: str) -> dict[str, Any]:
    """Run one stage in its own process and return its manifest's key, seconds and figures. Raises the error that the stage raised."""
    run = RunDir(Path(run_dir))
    here, config = run.round(round_number), read_run_config(run)
    if is_current(run, round_number, name):
        tell(Event("found", round_number, name))
        return _figures(here.stage(name))
    here.failure(name).unlink(missing_ok=True)
    tell(Event("began", round_number, name))
    started = time.monotonic()
    try:
        code, tail = run_supervised(
            stage_command(config, run, round_number, name),
            log_file=run.log(round_number, name),
            on_line=_line_teller(config, round_number, name),
            timeout_s=config.stage_timeout_s,
        )
    except StageTimeoutError as error:
        tell(Event("ended", round_number, name, str(error), time.monotonic() - started))
        raise StageFailedError(name, STOPPED, f"{error} (stage_timeout_s); its log is {run.log(round_number, name)}") from None
    if code != 0:
        failure = stage_error(here, name, code, tail)
        tell(Event("ended", round_number, name, str(failure), time.monotonic() - started))
        raise failure
    tell(Event("ended", round_number, name, "", time.monotonic() - started))
    return _figures(here.stage(name))


def _figures(directory: Path) -> dict[str, Any]:
    manifest = read_manifest(directory)
    if manifest is None:
        raise CorruptArtifactError(f"{directory} is not published, though its stage ended well; run the same command again")
    return {"key": manifest.key, "seconds": manifest.seconds, "metrics": manifest.outcome.metrics}


def run_stage(config: RunConfig, run: RunDir, round_number: int, name: str) -> None:
    """Called directly, never `.submit()`: signals and time-outs reach the main thread only."""
    delays = RETRY_DELAYS_S[: config.stage_retries] or 0
    stage_task.with_options(retries=config.stage_retries, retry_delay_seconds=delays)(str(run.path), round_number, name)


def _line_teller(config: RunConfig, round_number: int, name: str) -> Callable[[str], None]:
    logger, redact = get_run_logger(), redactor(config)
    last_sent = 0.0

    def on_line(line: str) -> None:
        nonlocal last_sent
        if not is_progress(name, line):
            return
        text = redact(line)
        tell(Event("line", round_number, name, text))
        if time.monotonic() - last_sent >= SERVER_LOG_EVERY_S:
            last_sent = time.monotonic()
            logger.info(text)

    return on_line
