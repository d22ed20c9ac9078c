"""Which stages a round has, and how one is run. Everything is read from the run directory, so a stage can
be run by a flow, in another container or by hand: `dpo-loop step train --run runs/demo --round 3`.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Any

from dpo_loop.artifacts import Stage, fingerprint, has_leftovers, materialize, read_manifest, verify
from dpo_loop.errors import DpoLoopError, InputError, InvalidRoundError
from dpo_loop.files import read_json
from dpo_loop.layout import JUDGE_TEST, STAGES, STAGES_OF_ROUND_0, TOP_UP, RunDir
from dpo_loop.types import StageManifest
from flows.config import RunConfig
from flows.failures import class_of, read_failure, record_failure
from flows.inputs import inputs_of, is_published, not_begun, top_up_of
from flows.stages import stage_of, version_of
from judges.accounts import Accounts
from judges.selftest.config import judges_to_test

# --------------------------------------------------------------------------------------------------------- which stages


def stages_of(config: RunConfig, round_number: int) -> tuple[str, ...]:
    """The stages of a round in order."""
    tested = (JUDGE_TEST,) if config.judge_test.enabled and judges_to_test(config.judge, config.grading) else ()
    optional = {
        "world": config.world is not None,
        "capability": bool(config.capability.tasks),
        "answer_again": config.answering.measure_churn,
        "grade_again": config.answering.measure_churn,
        **dict.fromkeys(("reserve", "look", *TOP_UP), config.prompts.eval_reserve > 0),
    }
    names = STAGES if round_number > 0 else STAGES_OF_ROUND_0
    return (*tested, *(name for name in names if optional.get(name, True)))


def planned_stages(run: RunDir, round_number: int) -> tuple[str, ...]:
    """Those of `stages_of` that this round needs, as far as is known: the top-up only where the first look could not decide."""
    config = read_run_config(run)
    topped_up = top_up_of(run, round_number, config) if is_published(run, round_number, "look") else ()
    return tuple(name for name in stages_of(config, round_number) if name not in TOP_UP or name in topped_up)


def read_run_config(run: RunDir) -> RunConfig:
    """Raises InputError where there is no run, CorruptArtifactError where its config cannot be read."""
    if not run.config.is_file():
        raise InputError(f"{run.path} is not a run directory: it has no {run.config.name}. Start one with `dpo-loop run CONFIG`.")
    return read_json(run.config, RunConfig)


def _check_exists(run: RunDir, round_number: int, name: str) -> None:
    config = read_run_config(run)
    names = stages_of(config, round_number)
    if name not in names:
        raise InputError(f"round {round_number} has no stage {name}; it has {', '.join(names)}")
    here = run.round(round_number)
    if not (here.parent.is_file() if round_number > 0 else here.path.is_dir()):
        raise InputError(not_begun(run, round_number))
    if name in TOP_UP and name not in top_up_of(run, round_number, config):
        raise InputError(f"round {round_number} needs no {name}: its first look decided, or the anchor is also the previous policy")


# ----------------------------------------------------------------------------------------------------------- its inputs


def plan(run: RunDir, round_number: int, name: str) -> tuple[Stage, dict[str, Any]]:
    """The stage and its inputs. Raises InputError for a stage that this round does not have."""
    config = read_run_config(run)
    _check_exists(run, round_number, name)
    invalid = invalid_reasons(run, round_number) if name == "gate" else ()
    accounts = Accounts(run.ledger, config.budget, round_number)
    return stage_of(run, name, invalid=bool(invalid), accounts=accounts), inputs_of(run, round_number, name, config, invalid)


def is_current(run: RunDir, round_number: int, name: str) -> bool:
    """Whether a stage is published, whole, and made from today's inputs by this version of dpo-loop and of the stage: then no process has to
    be started for it. A False says only that `run_step` will find out. Raises CorruptArtifactError if a file differs from its hash.
    """
    out = run.round(round_number).stage(name)
    manifest = read_manifest(out)
    if manifest is None or has_leftovers(out) or manifest.versions.get("dpo-loop") != metadata.version("dpo-loop"):
        return False
    verify(out, manifest)
    config = read_run_config(run)
    invalid = invalid_reasons(run, round_number) if name == "gate" else ()
    if manifest.version != version_of(run, name, invalid=bool(invalid)):
        return False
    return bool(manifest.inputs == fingerprint(inputs_of(run, round_number, name, config, invalid)))


# -------------------------------------------------------------------------------------------------- running and failing


def import_from_here() -> None:
    """Let a config name modules of the working directory, as `python -m` does for the processes that flows start; a console script does not."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)


def run_step(run: RunDir, round_number: int, name: str) -> StageManifest:
    """Run one stage in this process, or return its manifest if it is published. Raises whatever the stage raises.

    An error of ours is left behind as a StageFailure; a success clears an earlier one. A stage that the round does not have, and a round
    that has not begun, are refused with InputError and leave nothing behind.
    """
    _check_exists(run, round_number, name)
    import_from_here()
    here = run.round(round_number)
    here.failure(name).unlink(missing_ok=True)
    try:
        stage, inputs = plan(run, round_number, name)
        return materialize(stage, here.stage(name), **inputs)
    except DpoLoopError as error:
        record_failure(here, name, error)
        raise


def invalid_reasons(run: RunDir, round_number: int) -> tuple[str, ...]:
    """Why a round cannot be judged: the words of the stage that said so; empty when it can."""
    here = run.round(round_number)
    for name in STAGES:
        failure = read_failure(here, name)
        if failure is None or is_published(run, round_number, name):
            continue
        if issubclass(class_of(failure), InvalidRoundError):
            return (f"{name}: {failure.message}",)
    return ()
