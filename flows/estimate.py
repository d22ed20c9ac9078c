"""`dpo-loop estimate CONFIG`: what the judging of one round will cost, from the config and the files that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpo_loop.config import BuiltinPool, JsonlPool
from dpo_loop.prompts.pool import read_pool
from dpo_loop.types import Side
from flows.config import RunConfig
from flows.paths import WORLD_PREFIX
from judges.estimate import LIKELY_BYTES_PER_TOKEN, Row, Work, looks_of, safety_works
from judges.selftest.config import judges_to_test
from judges.selftest.golden import DRIFT_TRIALS, load_golden, trials_of

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN_PROMPT_BYTES = 400
"""Of a prompt in a pool that is not read here."""
WORLD_PROMPT_BYTES = 40


def works_of(config: RunConfig) -> list[Work]:
    """The test of the judges, the labels of a round and the win rates of its evaluation. Raises InputError if a file of prompts cannot be read."""
    num, prompt_bytes = _pool(config)
    prompts = config.prompts
    fresh = num if num is None else round(num * (1 - prompts.eval_fraction) / prompts.num_buckets)
    labels = prompts.num_per_round if fresh is None else min(prompts.num_per_round, fresh)
    held_out = prompts.max_eval if num is None else min(prompts.max_eval, round(num * prompts.eval_fraction))
    held_out += _num_prompts(config, Side.TASK)
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
            {side: _num_prompts(config, side) for side in (Side.HARMFUL, Side.BENIGN)},
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
    read = [
        pool
        for pool in config.prompts.eval_sets
        if isinstance(pool, BuiltinPool) or (isinstance(pool, JsonlPool) and not pool.path.startswith(WORLD_PREFIX))
    ]
    return sum(prompt.side is side for pool in read for prompt in read_pool(pool, None, skip_bad=True).prompts)


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
    if not caps:
        lines.append("No cap is set; budget.usd_per_round stops a round before the call that would go over it.")
    for name, cap in caps.items():
        needed = told["usd_at_most"] if name.startswith("usd") else told["calls_at_most"]
        likely = told["usd"] if name.startswith("usd") else told["calls"]
        word = "covers the round" if cap >= needed else "may stop the round" if cap >= likely else "will probably stop the round"
        lines.append(f"budget.{name} = {cap:g} {word}.")
    return lines
