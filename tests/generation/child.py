"""Child processes of the generation tests: real stages on the real vLLM. `python -m tests.generation.child ROOT PART`.

victim     GENERATE as the flow runs it; the test kills it after its first shard
answer     ANSWER with the bare base, greedy
scenarios  everything that needs an engine with the adapter, on one engine
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.errors import CanaryError, PolicyError
from dpo_loop.generation.canary import check_canary, read_canary
from dpo_loop.generation.engine import Engine, open_engine
from dpo_loop.generation.stage import ANSWER, GENERATE, generate
from tests.generation.worlds import ANSWERING, ENGINE, World


class BaseOnly:
    """An engine that loaded the adapter and serves the bare base all the same: the fault that the canary is there for."""

    def __init__(self, engine: Engine) -> None:
        self.start_s, self.sample, self._engine = engine.start_s, engine.sample, engine

    def score(self, sequences: list[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        return self._engine.score(sequences, with_adapter=False)


def victim(world: World) -> None:
    materialize(GENERATE, world.rounds / "killed", **world.generate_inputs())


def answer(world: World) -> None:
    inputs = {"prompts": world.prompts, "policy": world.base_policy(), "engine": ENGINE, "config": ANSWERING, "seed": 7}
    materialize(ANSWER, world.rounds / "answer", **inputs)


def scenarios(world: World) -> None:
    too_long = _complaint(lambda: open_engine(world.policy(), ENGINE.model_copy(update={"max_model_len": 4_096})))
    head = world.policy().model_copy(update={"adapter": str(world.head_adapter)})
    adapted_head = _complaint(lambda: open_engine(head, ENGINE))
    engine = open_engine(world.policy(), ENGINE)
    stage = Stage(GENERATE.name, GENERATE.version, partial(generate, start=lambda policy, config: engine))
    materialize(stage, world.rounds / "killed", **world.generate_inputs())
    materialize(stage, world.rounds / "whole", **world.generate_inputs())
    materialize(stage, world.rounds / "other_seed", **world.generate_inputs(seed=8))
    mine, other = read_canary(world.policy()), read_canary(world.other_policy())
    seen = {
        "adapted_head": adapted_head,
        "too_long_context": too_long,
        "not_applied": _complaint(lambda: check_canary(BaseOnly(engine), mine, tolerance=10.0, max_tokens=255)),
        "other_adapter": _complaint(lambda: check_canary(engine, other, tolerance=ENGINE.canary_tolerance, max_tokens=255)),
    }
    (world.root / "seen.json").write_text(json.dumps(seen))


def _complaint(check: Callable[[], object]) -> str:
    try:
        check()
    except (CanaryError, PolicyError) as error:
        return f"{type(error).__name__}: {error}"
    return "no complaint"


if __name__ == "__main__":
    {"victim": victim, "answer": answer, "scenarios": scenarios}[sys.argv[2]](World(Path(sys.argv[1])))
