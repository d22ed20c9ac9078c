"""Stages `evalset` and `reserve`, once a run, and `prompts`, once a round."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from dpo_loop.artifacts import Stage
from dpo_loop.config import BuiltinPool, PromptsConfig
from dpo_loop.contamination import Corpus, asked
from dpo_loop.errors import InputError
from dpo_loop.exchange import PROMPT_SETS, read_prompts
from dpo_loop.exchange import PROMPTS as PROMPTS_FILE
from dpo_loop.files import write_json, write_jsonl
from dpo_loop.progress import say
from dpo_loop.prompts.pool import PoolContents, normalised, read_pool
from dpo_loop.prompts.split import bucket_of, is_held_out, is_reserved, shuffled, turn_of
from dpo_loop.types import Prompt, PromptSet, Side, StageOutcome, Tally


def carve_evaluation(
    out: Path,
    *,
    config: PromptsConfig,
    pool: Path | None,
    eval_sets: tuple[Path | None, ...],
    seed: int,
    part: Literal["main", "reserve"] = "main",
) -> StageOutcome:
    """Held-out prompts of the pool, at most `max_eval`, then the further sets in their own order, each question once.

    part: `main` is without the prompts that `eval_reserve` holds back, `reserve` is those alone.
    """
    say(f"evaluation prompts, {part}: reading the pool {config.pool.path}")
    contents = read_pool(config.pool, pool, skip_bad=config.skip_bad)
    held_out = shuffled((p for p in contents.prompts if is_held_out(p, config=config, seed=seed)), seed=seed)
    there: set[str] = set()
    taken: list[Prompt] = []
    sets: list[PromptSet] = []

    def take(prompts: Iterable[Prompt], origin: PoolContents) -> Counter[str]:
        """Counts the questions that are new; those of the other part are not written here."""
        fresh = {normalised(prompt): prompt for prompt in prompts if normalised(prompt) not in there}
        there.update(fresh)
        mine = [p for p in fresh.values() if is_reserved(p, config=config, seed=seed) == (part == "reserve")]
        taken.extend(mine)
        sets.append(_set_of(origin, mine))
        return +Counter(taken=len(mine), in_the_other_part=len(fresh) - len(mine))

    counts = take(held_out[: config.max_eval], contents)
    parts = {
        "held_out": counts.pop("taken", 0),
        **counts,
        "beyond_max_eval": max(0, len(held_out) - config.max_eval),
        "for_rounds": len(contents.prompts) - len(held_out),
    }
    tallies = [Tally(of="pool prompts", total=contents.num_lines, parts={**parts, **contents.bad_counts})]
    for number, (source, file) in enumerate(zip(config.eval_sets, eval_sets, strict=True), start=1):
        further = read_pool(source, file, skip_bad=config.skip_bad)
        counts = take(further.prompts, further)
        parts = {"taken": 0, **counts, "already_there": len(further.prompts) - counts.total()}
        tallies.append(Tally(of=f"eval set {number} prompts", total=further.num_lines, parts={**parts, **further.bad_counts}))
    if not taken:
        raise InputError(_nothing_to_evaluate(part, config, contents))
    write_jsonl(out / PROMPTS_FILE, taken)
    write_json(out / PROMPT_SETS, [prompt_set.model_dump(mode="json") for prompt_set in sets])
    sides = {side.value: sum(prompt.side is side for prompt in taken) for side in Side}
    say(f"evaluation prompts, {part}: {len(taken)}, " + ", ".join(f"{num} {side}" for side, num in sides.items()))
    return StageOutcome(
        tallies=tuple(tallies),
        metrics={
            "num_prompts": len(taken),
            **{f"num_{side}": num for side, num in sides.items()},
            "num_sets_skipped": sum(bool(prompt_set.skipped) for prompt_set in sets),
        },
    )


def carve_reserve(
    out: Path, *, config: PromptsConfig, pool: Path | None, eval_sets: tuple[Path | None, ...], seed: int
) -> StageOutcome:
    """The evaluation prompts that `eval_reserve` holds back for a second look."""
    return carve_evaluation(out, config=config, pool=pool, eval_sets=eval_sets, seed=seed, part="reserve")


def take_prompts(
    out: Path, *, config: PromptsConfig, pool: Path | None, evalset: Path, round: int, seed: int, reserve: Path | None = None
) -> StageOutcome:
    """The prompts of one round: its bucket of the pool, at most `num_per_round`. Never an evaluation prompt, one in reserve included, nor one of the
    sets that come with the package, whether or not this run evaluates with them, nor a near copy of either."""
    if config.eval_reserve and reserve is None:
        raise InputError(
            "prompts.eval_reserve holds evaluation prompts back, and they must be known to be kept from training; give the stage `reserve`"
        )
    turn = turn_of(round, config=config)
    say(f"prompts: reading the pool {config.pool.path}")
    contents = read_pool(config.pool, pool, skip_bad=config.skip_bad)
    evaluation = [prompt for part in (evalset, reserve) if part is not None for prompt in read_prompts(part)]
    package = read_pool(BuiltinPool(kind="builtin", set="core-v1"), None, skip_bad=False).prompts
    evaluated, of_package = ({normalised(prompt) for prompt in prompts} for prompts in (evaluation, package))
    corpora = [Corpus(map(asked, prompts)) for prompts in (evaluation, package)]

    def place(prompt: Prompt) -> str:
        if is_held_out(prompt, config=config, seed=seed) or normalised(prompt) in evaluated:
            return "evaluation"
        if normalised(prompt) in of_package:
            return "built_in_evaluation"
        if any(corpus.overlaps(asked(prompt)) for corpus in corpora):
            return "near_evaluation"
        return "mine" if bucket_of(prompt, config=config, seed=seed) == turn.bucket else "other_rounds"

    places = [(place(prompt), prompt) for prompt in contents.prompts]
    mine = shuffled((prompt for where, prompt in places if where == "mine"), seed=seed)
    counts = Counter(where for where, _ in places if where != "mine")
    if not mine:
        raise InputError(
            f"round {round} has no prompts: bucket {turn.bucket + 1} of {config.num_buckets} is empty, the pool has only "
            f"{len(contents.prompts)} prompts, of which {counts['near_evaluation']} are nearly those of the evaluation. Add prompts, or lower "
            "prompts.num_buckets (in a new run)."
        )
    taken = mine[: config.num_per_round]
    write_jsonl(out / PROMPTS_FILE, taken)
    say(f"prompts: {len(taken)} of the pool's {len(contents.prompts)} for round {round}")
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


def _set_of(contents: PoolContents, prompts: list[Prompt]) -> PromptSet:
    ids = "\n".join(prompt.id for prompt in prompts)
    return PromptSet(
        source=contents.source,
        revision=contents.revision,
        licence=contents.licence,
        sha256=hashlib.sha256(ids.encode()).hexdigest() if prompts else "",
        num_prompts=len(prompts),
        skipped=contents.skipped,
    )


def _nothing_to_evaluate(part: str, config: PromptsConfig, contents: PoolContents) -> str:
    if part == "reserve":
        return f"no evaluation prompts in reserve: eval_reserve {config.eval_reserve} of them is none. Raise prompts.eval_reserve (in a new run)."
    return (
        f"no evaluation prompts: eval_fraction {config.eval_fraction} of {len(contents.prompts)} prompts is none, and the eval_sets, if there are any, "
        "have none either or all are in reserve. Raise prompts.eval_fraction, name prompts.eval_sets, or lower prompts.eval_reserve (in a new run)."
    )


# Both are also bumped when a pin or a column map of prompts/external.py changes, PROMPTS when a set of the package does: the inputs do not show it.
EVALSET = Stage(name="evalset", version=2, run=carve_evaluation)
RESERVE = Stage(name="reserve", version=1, run=carve_reserve)
PROMPTS = Stage(name="prompts", version=3, run=take_prompts)
