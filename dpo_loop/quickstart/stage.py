"""Stage `world`: a model that knows nothing, demonstrations that are partly wrong, a pool of prompts and two safety sets.

Everything follows from one seed, byte for byte. No prompt is in two of the files (see parts.py); pool and demonstrations mix tasks
with harmful requests and their benign twins, so that rounds of DPO have pairs for safety as well.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from dpo_loop.artifacts import Stage
from dpo_loop.config import TinyWorldConfig
from dpo_loop.files import write_jsonl
from dpo_loop.progress import say
from dpo_loop.quickstart.families import Task, draw_task, wrong_answer
from dpo_loop.quickstart.parts import Part, draw_unique
from dpo_loop.quickstart.safety import Request, draw_harmful, unwanted_reply, wanted_reply
from dpo_loop.types import StageOutcome, Tally

MODEL, DEMONSTRATIONS, POOL, HARMFUL, BENIGN = "model", "demonstrations.jsonl", "pool.jsonl", "harmful.jsonl", "benign.jsonl"
SHARE_HARMFUL = 0.15
"""Of demonstrations and pool; as many again are their benign twins."""


def run(out: Path, *, config: TinyWorldConfig) -> StageOutcome:
    from dpo_loop.quickstart.world import write_model

    rng = Random(config.seed)
    asked = _mixed(config.num_demonstrations, Part.DEMONSTRATIONS, config, rng)
    num_wrong = round(config.wrong_demonstrations * len(asked))
    wrong = set(rng.sample(range(len(asked)), num_wrong))
    replies = [_reply(item, rng, wrong=index in wrong) for index, item in enumerate(asked)]
    write_jsonl(out / DEMONSTRATIONS, ({"messages": _turns(item.text, reply)} for item, reply in zip(asked, replies, strict=True)))

    pool = _mixed(config.num_prompts, Part.POOL, config, rng)
    write_jsonl(out / POOL, map(_prompt, pool))
    pairs = draw_unique(
        lambda: draw_harmful(rng), max(config.num_harmful, config.num_benign), part=Part.SAFETY_EVALUATION, seed=config.seed
    )
    write_jsonl(out / HARMFUL, map(_prompt, pairs[: config.num_harmful]))
    write_jsonl(out / BENIGN, (_prompt(request.twin) for request in pairs[: config.num_benign]))
    say(f"world: {len(asked)} demonstrations ({num_wrong} wrong on purpose), {len(pool)} prompts, {len(pairs)} safety pairs")

    sizes = write_model(
        out / MODEL, [text for item, reply in zip(asked, replies, strict=True) for text in (item.text, reply)], seed=config.seed
    )
    say(f"world: a model of {sizes['num_weights']} random weights and {sizes['num_tokens']} tokens")
    return StageOutcome(
        tallies=(
            Tally(of="demonstrations", total=len(asked), parts={"right": len(asked) - num_wrong, "wrong": num_wrong}),
            _kinds("pool prompts", pool),
        ),
        metrics=sizes,
    )


WORLD = Stage(name="world", version=2, run=run)


def _mixed(num: int, part: Part, config: TinyWorldConfig, rng: Random) -> list[Task | Request]:
    """Tasks, harmful requests and their twins in random order."""
    num_harmful = round(SHARE_HARMFUL * num)
    harmful = draw_unique(lambda: draw_harmful(rng), num_harmful, part=part, seed=config.seed)
    tasks = draw_unique(lambda: draw_task(rng), num - 2 * num_harmful, part=part, seed=config.seed)
    mixed: list[Task | Request] = [*tasks, *harmful, *(request.twin for request in harmful)]
    rng.shuffle(mixed)
    return mixed


def _reply(asked: Task | Request, rng: Random, *, wrong: bool) -> str:
    match asked:
        case Task():
            return wrong_answer(asked, rng) if wrong else asked.right
        case Request():
            return unwanted_reply(asked, rng) if wrong else wanted_reply(asked, rng)


def _turns(text: str, reply: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]


def _prompt(asked: Task | Request) -> dict[str, object]:
    return {"prompt": asked.text, "tags": asked.tags}


def _kinds(of: str, asked: list[Task | Request]) -> Tally:
    kinds = [item.side.value if isinstance(item, Request) else "task" for item in asked]
    return Tally(of=of, total=len(kinds), parts={kind: kinds.count(kind) for kind in sorted(set(kinds))})
