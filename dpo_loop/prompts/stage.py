"""Stages `evalset`, once a run, and `prompts`, once a round."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dpo_loop.artifacts import Stage
from dpo_loop.config import BuiltinPool, PromptsConfig
from dpo_loop.errors import InputError
from dpo_loop.exchange import PROMPTS as PROMPTS_FILE
from dpo_loop.exchange import read_prompts
from dpo_loop.files import write_jsonl
from dpo_loop.progress import say
from dpo_loop.prompts.pool import normalised, read_pool
from dpo_loop.prompts.split import bucket_of, is_held_out, shuffled, turn_of
from dpo_loop.types import Prompt, Side, StageOutcome, Tally


def carve_evaluation(
    out: Path, *, config: PromptsConfig, pool: Path | None, eval_sets: tuple[Path | None, ...], seed: int
) -> StageOutcome:
    """Held-out prompts of the pool, at most `max_eval`, then the further sets in their own order, each question once."""
    say(f"evalset: reading the pool {config.pool.path}")
    contents = read_pool(config.pool, pool, skip_bad=config.skip_bad)
    held_out = shuffled((p for p in contents.prompts if is_held_out(p, config=config, seed=seed)), seed=seed)
    chosen = {normalised(prompt): prompt for prompt in held_out[: config.max_eval]}
    tallies = [
        Tally(
            of="pool prompts",
            total=contents.num_lines,
            parts={
                "held_out": len(chosen),
                "beyond_max_eval": len(held_out) - len(chosen),
                "for_rounds": len(contents.prompts) - len(held_out),
                **contents.bad_counts,
            },
        )
    ]
    for number, (source, file) in enumerate(zip(config.eval_sets, eval_sets, strict=True), start=1):
        further = read_pool(source, file, skip_bad=config.skip_bad)
        num_before = len(chosen)
        for prompt in further.prompts:
            chosen.setdefault(normalised(prompt), prompt)
        num_taken = len(chosen) - num_before
        parts = {"taken": num_taken, "already_there": len(further.prompts) - num_taken, **further.bad_counts}
        tallies.append(Tally(of=f"eval set {number} prompts", total=further.num_lines, parts=parts))
    if not chosen:
        raise InputError(
            f"no evaluation prompts: eval_fraction {config.eval_fraction} of {len(contents.prompts)} prompts is none, and there are no "
            "eval_sets. Raise prompts.eval_fraction or name prompts.eval_sets."
        )
    prompts = list(chosen.values())
    write_jsonl(out / PROMPTS_FILE, prompts)
    sides = {side.value: sum(prompt.side is side for prompt in prompts) for side in Side}
    say(f"evalset: {len(prompts)} prompts, " + ", ".join(f"{num} {side}" for side, num in sides.items()))
    return StageOutcome(
        tallies=tuple(tallies), metrics={"num_prompts": len(prompts), **{f"num_{side}": num for side, num in sides.items()}}
    )


def take_prompts(out: Path, *, config: PromptsConfig, pool: Path | None, evalset: Path, round: int, seed: int) -> StageOutcome:
    """The prompts of one round: its bucket of the pool, at most `num_per_round`, never an evaluation prompt, and never one of the sets that come
    with the package, whether or not this run evaluates with them."""
    turn = turn_of(round, config=config)
    say(f"prompts: reading the pool {config.pool.path}")
    contents = read_pool(config.pool, pool, skip_bad=config.skip_bad)
    evaluated = {normalised(prompt) for prompt in read_prompts(evalset)}
    of_package = {
        normalised(prompt) for prompt in read_pool(BuiltinPool(kind="builtin", set="core-v1"), None, skip_bad=False).prompts
    }

    def place(prompt: Prompt) -> str:
        if is_held_out(prompt, config=config, seed=seed) or normalised(prompt) in evaluated:
            return "evaluation"
        if normalised(prompt) in of_package:
            return "built_in_evaluation"
        return "mine" if bucket_of(prompt, config=config, seed=seed) == turn.bucket else "other_rounds"

    places = [(place(prompt), prompt) for prompt in contents.prompts]
    mine = shuffled((prompt for where, prompt in places if where == "mine"), seed=seed)
    if not mine:
        raise InputError(
            f"round {round} has no prompts: bucket {turn.bucket + 1} of {config.num_buckets} is empty, the pool has only "
            f"{len(contents.prompts)} prompts. Add prompts, or lower prompts.num_buckets (in a new run)."
        )
    taken = mine[: config.num_per_round]
    write_jsonl(out / PROMPTS_FILE, taken)
    say(f"prompts: {len(taken)} of the pool's {len(contents.prompts)} for round {round}")
    counts = Counter(where for where, _ in places if where != "mine")
    parts = {
        "taken": len(taken),
        "beyond_num_per_round": len(mine) - len(taken),
        **dict(sorted(counts.items())),
        **contents.bad_counts,
    }
    return StageOutcome(
        tallies=(Tally(of="pool prompts", total=contents.num_lines, parts=parts),),
        metrics={"num_prompts": len(taken), "bucket": turn.bucket, "cycle": turn.cycle},
    )


EVALSET = Stage(name="evalset", version=1, run=carve_evaluation)
# Also bumped when a set of the package changes, which the stage's inputs do not show.
PROMPTS = Stage(name="prompts", version=2, run=take_prompts)
