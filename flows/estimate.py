"""`dpo-loop estimate CONFIG`: what the judging of one round will cost, from the config and the files that it names. Its memory: training_memory.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, assert_never

from dpo_loop.config import BuiltinPool, ExternalPool, HubPool, JsonlPool, Pool
from dpo_loop.prompts.pool import read_pool
from dpo_loop.types import Side
from flows.config import RunConfig
from flows.paths import WORLD_PREFIX
from judges.estimate import LIKELY_BYTES_PER_TOKEN, Row, Work, as_json, estimate, looks_of, safety_works
from judges.selftest.config import judges_to_test
from judges.selftest.golden import DRIFT_TRIALS, load_golden, trials_of

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN_PROMPT_BYTES = 400
"""Of a prompt in a pool that is not read here."""
WORLD_PROMPT_BYTES = 40
_POLICIES_OF_A_TOP_UP = 3
"""Candidate, previous and anchor answer the reserve: none of them was asked it when it was a candidate, unless its own look could not decide."""


def rows_of(config: RunConfig) -> list[Row]:
    """The reserve of evaluation prompts is asked only where the gate's first look cannot decide, so it is in what is spent at most and in nothing else."""
    likely, most = (estimate(works_of(config, with_reserve=counted), config.budget) for counted in (False, True))
    return [
        replace(row, calls_at_most=whole.calls_at_most, usd_at_most=whole.usd_at_most)
        for row, whole in zip(likely, most, strict=True)
    ]


def told_of(rows: list[Row], config: RunConfig) -> dict[str, Any]:
    return as_json(rows, config.budget) | {"eval_reserve": config.prompts.eval_reserve, "not_counted": not_counted(config)}


def works_of(config: RunConfig, *, with_reserve: bool = True) -> list[Work]:
    """The test of the judges, the labels of a round and the win rates of its evaluation. Raises InputError if a file of prompts cannot be read."""
    num, prompt_bytes = _pool(config)
    at_first = 1 - config.prompts.eval_reserve
    prompts = config.prompts
    fresh = num if num is None else round(num * (1 - prompts.eval_fraction) / prompts.num_buckets)
    labels = prompts.num_per_round if fresh is None else min(prompts.num_per_round, fresh)
    held_out = prompts.max_eval if num is None else min(prompts.max_eval, round(num * prompts.eval_fraction))
    held_out += _num_prompts(config, Side.TASK)
    if not with_reserve:
        held_out = round(held_out * at_first)
    graded = {side: _num_prompts(config, side) for side in (Side.HARMFUL, Side.BENIGN)}
    for side, whole in graded.items():
        first = round(whole * at_first)
        graded[side] = first + with_reserve * _POLICIES_OF_A_TOP_UP * (whole - first)
    generation = config.generation
    return [
        *_tests(config),
        Work(
            what=f"labels: {labels} prompts, {generation.k} answers each",
            judge=config.judge,
            num_prompts=labels,
            looks=looks_of(config.judging.selection, generation.k),
            prompt_bytes=prompt_bytes,
            answer_tokens=generation.max_new_tokens,
        ),
        Work(
            what=f"win rates: {held_out} prompts against previous and anchor",
            judge=config.grading.win_judge or config.judge,
            num_prompts=2 * held_out,
            looks=0,
            prompt_bytes=prompt_bytes,
            answer_tokens=config.answering.max_new_tokens,
        ),
        *safety_works(
            config.grading.safety,
            graded,
            prompt_bytes=prompt_bytes,
            answer_tokens=config.answering.max_new_tokens,
        ),
    ]


def _tests(config: RunConfig) -> Iterator[Work]:
    if not config.judge_test.enabled:
        return
    trials = trials_of(load_golden())
    texts = [len(answer.text.encode()) for trial in trials for answer in trial.answers]
    for name, judge in judges_to_test(config.judge, config.grading).items():
        yield Work(
            what=f"self-test of {name}: {len(trials)} pairs, once; later rounds ask {DRIFT_TRIALS} again",
            judge=judge,
            num_prompts=len(trials),
            looks=0,
            prompt_bytes=round(fmean(len(trial.prompt.text.encode()) for trial in trials)),
            # Half of it is likely (see the table), and the texts are there to be counted.
            answer_tokens=round(2 * fmean(texts) / LIKELY_BYTES_PER_TOKEN),
        )


def _num_prompts(config: RunConfig, side: Side) -> int:
    """Of one side in the evaluation sets that are read here: not in a world that is still to be made, nor in a set of the hub."""
    read = (read_pool(pool, None, skip_bad=True).prompts for pool in config.prompts.eval_sets if _elsewhere(pool) is None)
    return sum(prompt.side is side for prompts in read for prompt in prompts)


def not_counted(config: RunConfig) -> list[str]:
    """Evaluation sets of which nobody knows here how many prompts they have."""
    return [name for pool in config.prompts.eval_sets if (name := _elsewhere(pool)) is not None]


def _elsewhere(pool: Pool) -> str | None:
    """The name of a set that is to be made or loaded, None for one that is here."""
    match pool:
        case ExternalPool():
            return pool.source or pool.set
        case HubPool():
            return pool.path
        case JsonlPool():
            return pool.path if pool.path.startswith(WORLD_PREFIX) else None
        case BuiltinPool():
            return None
        case _:
            assert_never(pool)


def _pool(config: RunConfig) -> tuple[int | None, int]:
    """Prompts in the pool, None where that is not known before it is loaded, and the mean bytes of one."""
    pool = config.prompts.pool
    if not isinstance(pool, JsonlPool):
        return None, UNKNOWN_PROMPT_BYTES
    if pool.path.startswith(WORLD_PREFIX):
        return (config.world.num_prompts if config.world else None), WORLD_PROMPT_BYTES
    num = size = 0
    with Path(pool.path).open("rb") as file:
        for line in file:
            num += bool(line.strip())
            size += len(line)
    return num, size // max(1, num)


def table_of(rows: list[Row], told: dict[str, Any]) -> Table:
    from rich.table import Table

    table = Table(title="judging of one round", title_justify="left", caption_justify="left")
    for heading in ("what", "judge", "calls", "tokens in", "tokens out", "likely", "at most"):
        table.add_column(heading, justify="left" if heading in ("what", "judge") else "right")
    for row in rows:
        calls = f"{row.calls:,}" if row.calls == row.calls_at_most else f"{row.calls:,} – {row.calls_at_most:,}"
        table.add_row(
            row.what,
            row.judge,
            calls,
            f"{row.input_tokens:,}",
            f"{row.output_tokens:,}",
            f"${row.usd:,.2f}",
            f"${row.usd_at_most:,.2f}",
        )
    table.add_section()
    table.add_row("all", "", f"{told['calls']:,}", "", "", f"${told['usd']:,.2f}", f"${told['usd_at_most']:,.2f}")
    return table


def lines_of(rows: list[Row], told: dict[str, Any]) -> list[str]:
    if not rows:
        return ["No remote judge: judging costs nothing."]
    caps = {name: cap for name, cap in told["caps"].items() if cap is not None}
    lines = [
        f"Prices as of {told['prices_as_of']}. Likely: answers half as long as they may be; at most: what the budget would set aside."
    ]
    if sets := told["not_counted"]:
        lines.append(
            f"not counted: the prompts of {', '.join(sets)}, which are not here before the run; they cost more than is said above."
        )
    if told["eval_reserve"]:
        lines.append(
            f"prompts.eval_reserve = {told['eval_reserve']:g}: this share of the evaluation is asked only where the gate's first look cannot decide, and "
            "is counted in `at most` alone."
        )
    if not caps:
        lines.append("No cap is set; budget.usd_per_round stops a round before the call that would go over it.")
    for name, cap in caps.items():
        needed = told["usd_at_most"] if name.startswith("usd") else told["calls_at_most"]
        likely = told["usd"] if name.startswith("usd") else told["calls"]
        word = "covers the round" if cap >= needed else "may stop the round" if cap >= likely else "will probably stop the round"
        lines.append(f"budget.{name} = {cap:g} {word}.")
    return lines
