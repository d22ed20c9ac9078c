"""Which config and which files each stage of a round gets, and how one is run. Everything is read from the run directory, so a stage can
be run by a flow, in another container or by hand: `dpo-loop step train --run runs/demo --round 3`.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, assert_never

from dpo_loop.artifacts import Stage, fingerprint, has_leftovers, materialize, read_manifest, sha256_file, verify
from dpo_loop.config import BuiltinPool, HubPool, JsonlPool, ModelStart, Pool, SftStart
from dpo_loop.errors import DpoLoopError, InputError, InvalidRoundError
from dpo_loop.files import read_json
from dpo_loop.layout import JUDGE_TEST, STAGES, STAGES_OF_ROUND_0, RunDir
from dpo_loop.policies import read_blessing, read_policy
from dpo_loop.prompts.builtin import builtin_file
from dpo_loop.types import Blessing, PolicyRef, StageManifest
from flows.config import WORLD_PREFIX, RunConfig, is_hub_id, placeless_start
from flows.failures import class_of, read_failure, record_failure
from flows.stages import stage_of, version_of
from judges.accounts import Accounts
from judges.selftest.config import judges_to_test

# --------------------------------------------------------------------------------------------------------- which stages


def stages_of(config: RunConfig, round_number: int) -> tuple[str, ...]:
    """The stages of a round in order."""
    tested = (JUDGE_TEST,) if config.judge_test.enabled and judges_to_test(config.judge, config.grading) else ()
    if round_number > 0:
        return (*tested, *STAGES)
    return (*tested, *(name for name in STAGES_OF_ROUND_0 if name != "world" or config.world is not None))


def read_run_config(run: RunDir) -> RunConfig:
    """Raises InputError where there is no run, CorruptArtifactError where its config cannot be read."""
    if not run.config.is_file():
        raise InputError(f"{run.path} is not a run directory: it has no {run.config.name}. Start one with `dpo-loop run CONFIG`.")
    return read_json(run.config, RunConfig)


def pinned_parent(run: RunDir, round_number: int) -> Blessing:
    """The blessing of the policy that a round generates with. Raises InputError if the round has not begun."""
    path = run.round(round_number).parent
    if not path.is_file():
        raise InputError(_not_begun(run, round_number))
    return read_blessing(path, run=run.path)


def _check_exists(run: RunDir, round_number: int, name: str) -> None:
    names = stages_of(read_run_config(run), round_number)
    if name not in names:
        raise InputError(f"round {round_number} has no stage {name}; it has {', '.join(names)}")
    here = run.round(round_number)
    if not (here.parent.is_file() if round_number > 0 else here.path.is_dir()):
        raise InputError(_not_begun(run, round_number))


def _not_begun(run: RunDir, round_number: int) -> str:
    return f"round {round_number} of {run.path} has not begun; start it with `dpo-loop round CONFIG`"


def is_published(run: RunDir, round_number: int, name: str) -> bool:
    return read_manifest(run.round(round_number).stage(name)) is not None


# ----------------------------------------------------------------------------------------------------------- its inputs


def plan(run: RunDir, round_number: int, name: str) -> tuple[Stage, dict[str, Any]]:
    """The stage and its inputs. Raises InputError for a stage that this round does not have."""
    config = read_run_config(run)
    _check_exists(run, round_number, name)
    invalid = invalid_reasons(run, round_number) if name == "gate" else ()
    accounts = Accounts(run.ledger, config.budget, round_number)
    return stage_of(run, name, invalid=bool(invalid), accounts=accounts), _inputs(run, round_number, name, config, invalid)


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
    return bool(manifest.inputs == fingerprint(_inputs(run, round_number, name, config, invalid)))


def _inputs(run: RunDir, round_number: int, name: str, config: RunConfig, invalid: tuple[str, ...]) -> dict[str, Any]:
    here, first = run.round(round_number), run.round(0)
    evalset = first.stage("evalset")
    match name:
        case "world":
            return {"config": config.world}
        case "seed":
            return _seed_inputs(run, config)
        case "evalset":
            return {
                "config": config.prompts,
                "pool": _pool_file(run, config.prompts.pool),
                "eval_sets": tuple(_pool_file(run, pool) for pool in config.prompts.eval_sets),
                "seed": config.seed,
            }
        case "prompts":
            return {
                "config": config.prompts,
                "pool": _pool_file(run, config.prompts.pool),
                "evalset": evalset,
                "round": round_number,
                "seed": config.seed,
            }
        case "generate":
            return {
                "prompts": here.stage("prompts"),
                "policy": pinned_parent(run, round_number).policy,
                "config": config.generation,
                "run_id": config.run_id,
                "round": round_number,
                "seed": config.seed,
            }
        case "judge":
            return {
                "prompts": here.stage("prompts"),
                "completions": here.stage("generate"),
                "judge": config.judge,
                "judging": config.judging,
                "seed": config.seed,
            }
        case "judgetest":
            from judges.selftest.golden import load_golden

            judges = judges_to_test(config.judge, config.grading)
            return {"judges": judges, "test": config.judge_test, "golden_sha256": load_golden().sha256}
        case "pair":
            return {
                "prompts": here.stage("prompts"),
                "completions": here.stage("generate"),
                "judgements": here.stage("judge"),
                "config": config.pairing,
            }
        case "train":
            return {
                "pairs": here.stage("pair"),
                "policy": pinned_parent(run, round_number).policy,
                "run_start": read_policy(first.stage("seed")),
                "config": config.training,
            }
        case "answer":
            return {
                "prompts": evalset,
                "policy": candidate_of(run, round_number),
                "engine": config.generation.engine,
                "config": config.answering,
                "seed": config.seed,
            }
        case "grade":
            played = round_number > 0
            return {
                "prompts": evalset,
                "candidate": here.stage("answer"),
                "previous": run.round(pinned_parent(run, round_number).round).stage("answer") if played else None,
                "anchor": first.stage("answer") if played else None,
                "grading": config.grading,
                "judge": config.judge,
                "seed": config.seed,
            }
        case "gate":
            return _gate_inputs(run, round_number, config, invalid)
        case "report":
            return _report_inputs(run, round_number, config)
    raise InputError(f"there is no stage {name}")


def candidate_of(run: RunDir, round_number: int) -> PolicyRef:
    """The policy that a round made: round 0 its start policy, later rounds what they trained."""
    return read_policy(run.round(round_number).stage("seed" if round_number == 0 else "train"))


def _seed_inputs(run: RunDir, config: RunConfig) -> dict[str, Any]:
    start = config.start
    demonstrations = start.demonstrations if isinstance(start, SftStart) else None
    adapter = start.adapter if isinstance(start, ModelStart) else None
    return {
        "start": placeless_start(start),
        "model": None if is_hub_id(start.model) else _file(run, start.model),
        "adapter": None if adapter is None else _file(run, adapter),
        "demonstrations": None if demonstrations is None else _file(run, demonstrations),
    }


def _gate_inputs(run: RunDir, round_number: int, config: RunConfig, invalid: tuple[str, ...]) -> dict[str, Any]:
    here, first = run.round(round_number), run.round(0)
    policies = {"previous": pinned_parent(run, round_number).policy, "anchor": read_policy(first.stage("seed"))}
    before = run.round(round_number - 1).gate_report
    chained = sha256_file(before) if before.is_file() else None
    identity = {"run_id": config.run_id, "round": round_number, "previous_report_sha256": chained}
    if invalid:
        candidate = candidate_of(run, round_number) if is_published(run, round_number, "train") else None
        return {"reasons": invalid, "candidate": candidate, **policies, **identity}
    return {
        "prompts": first.stage("evalset"),
        "grades": here.stage("grade"),
        "candidate": candidate_of(run, round_number),
        **policies,
        "heuristic_safety": config.grading.safety.kind == "heuristic",
        "config": config.gate,
        **identity,
    }


def _report_inputs(run: RunDir, round_number: int, config: RunConfig) -> dict[str, Any]:
    """The report is made before a person decides, so its own row of the history says only what the gate said."""
    from flows.summary import history_for_report

    def made(name: str, number: int = round_number) -> Path | None:
        return run.round(number).stage(name) if is_published(run, number, name) else None

    history = history_for_report(run, round_number)
    return {
        "run_id": config.run_id,
        "round": round_number,
        "gate": made("gate"),
        "prompts": made("evalset", 0),
        "grades": made("grade"),
        "judgements": made("judge"),
        "pairs": made("pair"),
        "train": made("train"),
        "history": history,
        "seconds": history[-1].seconds,
    }


def _pool_file(run: RunDir, pool: Pool) -> Path | None:
    """The file of a pool, so that its content is in the stage's key; a data set of the hub has none."""
    match pool:
        case JsonlPool():
            return _file(run, pool.path)
        case BuiltinPool():
            return builtin_file(pool.set)
        case HubPool():
            return None
        case _:
            assert_never(pool)


def _file(run: RunDir, path: str) -> Path:
    if path.startswith(WORLD_PREFIX):
        return run.round(0).stage("world") / path.removeprefix(WORLD_PREFIX)
    return Path(path)


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
