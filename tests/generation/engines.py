"""Engines without a model, and the stage `capability` played on one."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.config import CapabilityConfig, CapabilityTask, EngineConfig, ExactMatchTask, MultipleChoiceTask, PerplexityTask
from dpo_loop.exchange import read_capability
from dpo_loop.generation.capability import CAPABILITY, measure
from dpo_loop.generation.engine import Answer
from dpo_loop.policies import describe_policy
from dpo_loop.types import CapabilityRow, FinishReason, PolicyRef
from tests.generation.worlds import ENGINE, World


class Even:
    """An engine that finds every token equally likely, but one that it makes `odd` of, and answers with nothing."""

    start_s = 0.0

    def __init__(self, *, odd: float = -1.0, fails_at_score: bool = False) -> None:
        self._odd, self._fails, self.num_sampled = odd, fails_at_score, 0

    def sample(self, asks: list[object], sampling: object, *, stage: str) -> list[Answer]:
        self.num_sampled += len(asks)
        return [Answer(token_ids=(0,), finish_reason=FinishReason.STOP, logprob=-1.0) for _ in asks]

    def score(self, sequences: list[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        if self._fails:
            raise RuntimeError("out of memory")
        return [[-1.0] * (len(ids) - 2) + [self._odd] for ids in sequences]


def exact(path: Path) -> ExactMatchTask:
    return ExactMatchTask(kind="exact_match", id="exact", path=str(path))


def choice(path: Path, *, normalised: bool = True) -> MultipleChoiceTask:
    return MultipleChoiceTask(kind="multiple_choice", id="choice", path=str(path), length_normalised=normalised)


def text(path: Path) -> PerplexityTask:
    return PerplexityTask(kind="perplexity", id="text", path=str(path))


def play(
    world: World, out: Path, engine: Even, *tasks: CapabilityTask, policy: PolicyRef | None = None
) -> dict[str, list[CapabilityRow]]:
    """policy: the bare base, left out."""

    def start(policy: PolicyRef, config: EngineConfig) -> Even:
        return engine

    stage = Stage(CAPABILITY.name, CAPABILITY.version, partial(measure, start=start))
    files = tuple(None if task.path is None else Path(task.path) for task in tasks)
    policy = policy or describe_policy(world.base)
    materialize(stage, out, policy=policy, engine=ENGINE, config=CapabilityConfig(tasks=tasks), files=files, seed=0)
    rows = list(read_capability(out))
    return {task.id: [row for row in rows if row.task == task.id] for task in tasks}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(path: Path, num: int = 10) -> Path:
    """Documents of two tokens and more, for a perplexity."""
    return write(path, *({"text": f"say the words {n}"} for n in range(num)))


def begun_with(versions: dict[str, str], folder: Path) -> None:
    """As if what lies in this folder of a stage's scratch had been made before the environment was upgraded."""
    known = folder / "versions.json"
    assert known.is_file()
    known.write_text(json.dumps({**json.loads(known.read_text()), **versions}))
