"""`dpo-loop estimate CONFIG`: what the judging of one round will cost, from the config and the files that it names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_loop.config import JsonlPool
from flows.config import WORLD_PREFIX, RunConfig
from judges.estimate import Row, Work, looks_of

if TYPE_CHECKING:
    from rich.table import Table

UNKNOWN_PROMPT_BYTES = 400
"""Of a prompt in a pool that is not read here."""
WORLD_PROMPT_BYTES = 40


def works_of(config: RunConfig) -> list[Work]:
    """The labels of a round and the win rates of its evaluation. Raises InputError if the pool cannot be read."""
    num, prompt_bytes = _pool(config)
    prompts = config.prompts
    fresh = num if num is None else round(num * (1 - prompts.eval_fraction) / prompts.num_buckets)
    labels = prompts.num_per_round if fresh is None else min(prompts.num_per_round, fresh)
    held_out = prompts.max_eval if num is None else min(prompts.max_eval, round(num * prompts.eval_fraction))
    generation = config.generation
    return [
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
    ]


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
