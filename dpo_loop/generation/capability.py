"""Stage `capability`: what a policy can do that nobody trains it on, a row per item, for the gate to compare with other policies' rows.

Tasks of other libraries are played first, in processes of their own, which leave the accelerator free for the engine. Then one engine, proven
by the canary, plays all local tasks. A task that is finished is kept when the stage is killed, and not played again unless the packages that
play it have other versions by then.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, scratch
from dpo_loop.config import CapabilityConfig, CapabilityTask, EngineConfig, LocalTask, ProducedTask
from dpo_loop.errors import ConfigError, InputError
from dpo_loop.exchange import CAPABILITY as ROWS_FILE
from dpo_loop.exchange import CONDITIONS
from dpo_loop.files import read_jsonl, write_json, write_jsonl, write_text
from dpo_loop.generation.canary import read_canary
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.conditions import conditions_of, engine_versions, folder_made_with
from dpo_loop.generation.engine import OpenEngine, open_engine, prepare_environment
from dpo_loop.generation.items import Item, read_items, too_few_documents
from dpo_loop.generation.local_tasks import run_local_task
from dpo_loop.generation.producers.request import Request
from dpo_loop.generation.producers.start import Produced, producer_versions, run_producer
from dpo_loop.generation.proof import check_policy, prove
from dpo_loop.progress import say
from dpo_loop.types import CapabilityRow, PolicyRef, StageOutcome, Tally

_PROOF = "proof.json"


def measure(
    out: Path,
    *,
    policy: PolicyRef,
    engine: EngineConfig,
    config: CapabilityConfig,
    files: tuple[Path | None, ...],
    seed: int,
    start: OpenEngine = open_engine,
) -> StageOutcome:
    """Rows of every task, by task, then by item. files: of each task, what its `path` names; None where it names nothing.

    seed: draws the examples that lm-eval shows first. Raises InputError with all bad lines, ConfigError where a library is missing and PolicyError
    before anything starts; CanaryError before the policy is asked anything.
    """
    places = {task.id: file for task, file in zip(config.tasks, files, strict=True)}
    local = [task for task in config.tasks if isinstance(task, LocalTask)]
    produced = [task for task in config.tasks if isinstance(task, ProducedTask)]
    items = _read_all(local, places)
    engine_has = engine_versions() if local else {}
    producers_have = producer_versions(produced)
    check_policy(policy, engine)
    canary = read_canary(policy)
    kept = _Kept(scratch(out), {task.id: producers_have.get(task.id, engine_has) for task in config.tasks})
    for one in produced:
        if not kept.has(one):
            say(f"capability: {one.id}: a process with {one.kind} begins")
            done = _produce(one, places[one.id], policy, engine, seed, kept.folder(one))
            kept.keep(one, done.rows, done.canary)
    prepare_environment()
    chat = Chat(policy)
    metrics: dict[str, Any] = {"engine_start_s": None}
    if todo := [task for task in local if not kept.has(task)]:
        running = start(policy, engine)
        say(f"capability: engine ready after {running.start_s:.1f} s")
        metrics["engine_start_s"] = round(running.start_s, 2)
        proof = prove("capability", running, canary, engine)
        for task in todo:
            kept.keep(task, run_local_task(task, items[task.id], running, chat, engine), proof)
    rows = {task.id: kept.rows(task) for task in config.tasks}
    write_jsonl(out / ROWS_FILE, (row for id in sorted(rows) for row in sorted(rows[id], key=lambda row: row.item_id)))
    conditions = conditions_of(
        policy,
        asked=([row.task, row.item_id] for of_task in rows.values() for row in of_task),
        template_sha256=chat.template_sha256,
        decoding={},
        engine=_that_matters(engine, local),
        canary=farthest([kept.proof(task) for task in config.tasks]),
        versions={**engine_has, **{f"{id}/{name}": version for id, of in producers_have.items() for name, version in of.items()}},
    )
    write_json(out / CONDITIONS, conditions)
    return StageOutcome(
        tallies=tuple(_tally(id, of_task) for id, of_task in rows.items()),
        metrics={**metrics, "canary": conditions.canary, "tasks": {id: figures_of(of_task) for id, of_task in rows.items()}},
    )


CAPABILITY = Stage("capability", 2, measure)


class _Kept:
    """Finished tasks, each in a folder that survives a crash for as long as the packages that play it have the same versions."""

    def __init__(self, scratch: Path, versions: Mapping[str, Mapping[str, str]]) -> None:
        """versions: task id → of the packages that play it."""
        self._scratch = scratch
        lost = {id: difference for id, of_task in versions.items() if (difference := folder_made_with(of_task, self._of(id)))}
        if lost:
            differences = "; ".join(dict.fromkeys(lost.values()))
            say(f"capability: {', '.join(lost)} made anew, since begun with other versions: {differences}")

    def folder(self, task: CapabilityTask) -> Path:
        return self._of(task.id)

    def has(self, task: CapabilityTask) -> bool:
        return (self.folder(task) / ROWS_FILE).is_file()

    def keep(self, task: CapabilityTask, rows: Sequence[CapabilityRow], proof: dict[str, Any] | None) -> None:
        """proof: figures of the canary. The rows come last: with them the task is finished."""
        write_text(self.folder(task) / _PROOF, json.dumps(proof))
        write_text(self.folder(task) / ROWS_FILE, "".join(row.model_dump_json() + "\n" for row in rows))
        figures = (f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in figures_of(rows).items())
        say(f"capability: {task.id}: {', '.join(figures)}")

    def rows(self, task: CapabilityTask) -> list[CapabilityRow]:
        return list(read_jsonl(self.folder(task) / ROWS_FILE, CapabilityRow))

    def proof(self, task: CapabilityTask) -> dict[str, Any] | None:
        proof: dict[str, Any] | None = json.loads((self.folder(task) / _PROOF).read_text())
        return proof

    def _of(self, task_id: str) -> Path:
        return self._scratch / f"task-{task_id}"


def farthest(proofs: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Figures of the process that was farthest from the policy: each task is played by the engine or a producer, and all have passed the canary.
    None where one had none to show."""
    shown = [proof for proof in proofs if proof is not None]
    return max(shown, key=lambda proof: float(proof["distance"])) if shown and len(shown) == len(proofs) else None


def _that_matters(engine: EngineConfig, local: Sequence[LocalTask]) -> dict[str, Any]:
    """Settings of the engine that can change a row: a producer takes nothing but the dtype from them."""
    return engine.model_dump(mode="json", exclude={"canary_tolerance"}) if local else {"dtype": engine.dtype}


def _read_all(tasks: Sequence[LocalTask], places: Mapping[str, Path | None]) -> dict[str, tuple[Item, ...]]:
    """Task id → its items. Raises InputError with the bad lines of all files."""
    items, problems = {}, []
    for task in tasks:
        file = places[task.id]
        if file is None:
            raise ConfigError([f"capability.tasks.{task.id}.path: {task.path} was not given to the stage"])
        items[task.id], bad = read_items(task, file)
        problems += bad
    if problems:
        raise InputError("\n".join(["the files of capability tasks cannot be used as they are:", *(f"  {p}" for p in problems)]))
    return items


def _produce(task: ProducedTask, file: Path | None, policy: PolicyRef, engine: EngineConfig, seed: int, folder: Path) -> Produced:
    here = folder.resolve()
    request = Request(
        task=task,
        policy=_absolute(policy),
        engine=engine,
        file=None if file is None else str(file.resolve()),
        seed=seed,
        rows=str(here / "produced.jsonl"),
        problem=str(here / "problem"),
        proof=str(here / "produced.proof.json"),
    )
    done = run_producer(request, log=here / "log")
    if any(row.measure == "nll" for row in done.rows) and (few := too_few_documents(task.id, len(done.rows))):
        raise InputError(few)
    return done


def _absolute(policy: PolicyRef) -> PolicyRef:
    """The process runs in another folder. A base that is no directory is a hub id."""
    paths = {name: getattr(policy, name) for name in ("base", "adapter", "canary")}
    found = {name: str(Path(path).resolve()) for name, path in paths.items() if path is not None and Path(path).exists()}
    return policy.model_copy(update=found)


def figures_of(rows: Sequence[CapabilityRow]) -> dict[str, float | int | None]:
    """accuracy, where an unscored item is wrong; or perplexity, over what was scored, None where that is nothing."""
    scored = [(row.value, row.weight) for row in rows if row.value is not None]
    counts = {"num_items": len(rows), "num_unscored": len(rows) - len(scored)}
    if all(row.measure == "correct" for row in rows):
        return {"accuracy": sum(value for value, _ in scored) / len(rows) if rows else None, **counts}
    weight = math.fsum(weight for _, weight in scored)
    mean = math.fsum(nll for nll, _ in scored) / weight if weight else math.nan
    return {"perplexity": math.exp(mean) if mean < 700 else None, **counts}


def _tally(id: str, rows: Sequence[CapabilityRow]) -> Tally:
    unscored = sum(row.value is None for row in rows)
    right = sum(row.measure == "correct" and row.value == 1 for row in rows)
    if all(row.measure == "correct" for row in rows):
        parts = {"right": right, "wrong": len(rows) - right - unscored, "unscored": unscored}
    else:
        parts = {"scored": len(rows) - unscored, "unscored": unscored}
    return Tally(of=f"items of {id}", total=len(rows), parts=parts)
