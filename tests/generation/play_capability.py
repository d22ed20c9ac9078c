"""A child process of test_capability.py: the stage on the real vLLM. `python -m tests.generation.play_capability ROOT OUT`."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.config import CapabilityConfig, ExactMatchTask, MultipleChoiceTask, PerplexityTask
from dpo_loop.errors import CanaryError
from dpo_loop.generation.capability import CAPABILITY, measure
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.engine import open_engine
from dpo_loop.generation.items import read_items
from dpo_loop.generation.local_tasks import score_choices
from tests.generation.child import BaseOnly
from tests.generation.worlds import ENGINE, World

MAX_NEW_TOKENS = 8
FILES = {"exact": "exact.jsonl", "folded": "folded.jsonl", "mean": "choices.jsonl", "sum": "choices.jsonl", "lines": "texts.jsonl"}
CONFIG = CapabilityConfig(
    tasks=(
        ExactMatchTask(kind="exact_match", id="exact", path=FILES["exact"], max_new_tokens=MAX_NEW_TOKENS),
        ExactMatchTask(kind="exact_match", id="folded", path=FILES["folded"], max_new_tokens=MAX_NEW_TOKENS, casefold=True),
        MultipleChoiceTask(kind="multiple_choice", id="mean", path=FILES["mean"]),
        MultipleChoiceTask(kind="multiple_choice", id="sum", path=FILES["sum"], length_normalised=False),
        PerplexityTask(kind="perplexity", id="lines", path=FILES["lines"]),
        PerplexityTask(kind="perplexity", id="book", path="book.txt"),
    )
)


def main(world: World, out: Path) -> None:
    engine = open_engine(world.policy(), ENGINE)
    files = tuple(out / task.path for task in CONFIG.tasks)
    inputs = {"policy": world.policy(), "engine": ENGINE, "config": CONFIG, "files": files, "seed": 3}
    stage = Stage(CAPABILITY.name, CAPABILITY.version, partial(measure, start=lambda policy, config: engine))
    materialize(stage, out / "rows", **inputs)
    bare = Stage(CAPABILITY.name, CAPABILITY.version, partial(measure, start=lambda policy, config: BaseOnly(engine)))
    try:
        materialize(bare, out / "bare", **inputs)
        complaint = "no complaint"
    except CanaryError as error:
        complaint = str(error)
    items, _ = read_items(CONFIG.tasks[2], out / FILES["mean"])
    values = {
        per_token: score_choices(items, engine, Chat(world.policy()), ENGINE, per_token=per_token) for per_token in (True, False)
    }
    (out / "seen.json").write_text(json.dumps({"bare": complaint, "mean": values[True], "sum": values[False]}))


if __name__ == "__main__":
    main(World(Path(sys.argv[1])), Path(sys.argv[2]))
