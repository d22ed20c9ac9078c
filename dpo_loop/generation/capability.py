"""Stage `capability`: what a policy can do that nobody trains it on, a row per item, for the gate to compare with other policies' rows.

Tasks of other libraries are played first, in processes of their own, which leave the accelerator free for the engine. Then one engine, proven
by the canary, plays all local tasks. A task that is finished is kept when the stage is killed, and not played again.
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
from dpo_loop.files import read_jsonl, write_jsonl, write_text
from dpo_loop.generation.canary import read_canary
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.engine import OpenEngine, open_engine, prepare_environment
from dpo_loop.generation.items import Item, read_items
from dpo_loop.generation.local_tasks import run_local_task
from dpo_loop.generation.producers.request import Request
from dpo_loop.generation.producers.start import producer_problems, run_producer
from dpo_loop.generation.proof import check_policy, prove
from dpo_loop.progress import say
from dpo_loop.types import CapabilityRow, PolicyRef, StageOutcome, Tally


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
    if problems := producer_problems(produced):
        raise ConfigError(problems)
    check_policy(policy, engine)
    canary = read_canary(policy)
    kept = _Kept(scratch(out))
    for one in produced:
        if not kept.has(one):
            say(f"capability: {one.id}: a process with {one.kind} begins")
            kept.keep(one, _produce(one, places[one.id], policy, engine, seed, kept.folder))
    metrics: dict[str, Any] = {"engine_start_s": None}
    if todo := [task for task in local if not kept.has(task)]:
        prepare_environment()
        chat = Chat(policy)
        running = start(policy, engine)
        say(f"capability: engine ready after {running.start_s:.1f} s")
        metrics["engine_start_s"] = round(running.start_s, 2)
        kept.prove(prove("capability", running, canary, engine))
        for task in todo:
            kept.keep(task, run_local_task(task, items[task.id], running, chat, engine))
    rows = {task.id: kept.rows(task) for task in config.tasks}
    write_jsonl(out / ROWS_FILE, (row for id in sorted(rows) for row in sorted(rows[id], key=lambda row: row.item_id)))
    return StageOutcome(
        tallies=tuple(_tally(id, of_task) for id, of_task in rows.items()),
        metrics={**metrics, "canary": kept.proof(), "tasks": {id: figures_of(of_task) for id, of_task in rows.items()}},
    )


CAPABILITY = Stage("capability", 1, measure)


class _Kept:
    """Finished tasks, in a folder that survives a crash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, task: CapabilityTask) -> bool:
        return self._file(task).is_file()

    def keep(self, task: CapabilityTask, rows: Sequence[CapabilityRow]) -> None:
        write_text(self._file(task), "".join(row.model_dump_json() + "\n" for row in rows))
        figures = (f"{name} {'-' if value is None else format(value, '.4g')}" for name, value in figures_of(rows).items())
        say(f"capability: {task.id}: {', '.join(figures)}")

    def rows(self, task: CapabilityTask) -> list[CapabilityRow]:
        return list(read_jsonl(self._file(task), CapabilityRow))

    def prove(self, figures: dict[str, Any] | None) -> None:
        write_text(self.folder / "proof.json", json.dumps(figures))

    def proof(self) -> Any:
        """Figures of the canary; None where no task needed an engine."""
        path = self.folder / "proof.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _file(self, task: CapabilityTask) -> Path:
        return self.folder / f"task-{task.id}.jsonl"


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
        raise InputError(
            "\n".join(["the files of capability tasks have lines that cannot be used:", *(f"  {p}" for p in problems)])
        )
    return items


def _produce(
    task: ProducedTask, file: Path | None, policy: PolicyRef, engine: EngineConfig, seed: int, folder: Path
) -> list[CapabilityRow]:
    here = folder.resolve()
    request = Request(
        task=task,
        policy=_absolute(policy),
        engine=engine,
        file=None if file is None else str(file.resolve()),
        seed=seed,
        rows=str(here / f"{task.id}.produced.jsonl"),
        problem=str(here / f"{task.id}.problem"),
    )
    return run_producer(request, log=here / f"{task.id}.log")


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
