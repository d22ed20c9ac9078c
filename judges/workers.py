"""Many prompts at once, with a bound, in an order that does not depend on who answers first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")

REPORT_EVERY_S = 5.0


async def for_each(
    items: Sequence[Item],
    work: Callable[[Item], Awaitable[Made]],
    take: Callable[[Made], None],
    *,
    concurrency: int,
    report: Callable[[int], None],
) -> None:
    """take(work(item)) for all items: the work at most `concurrency` at once, the taking in the order of `items`, as early as that allows.

    report(number done) is called every five seconds and at the end. The first error stops the taking of new items; those under
    way come to their end, so that no paid reply is thrown away, then the error is raised.
    """
    made: dict[int, Made] = {}
    num_taken = 0
    waiting = iter(range(len(items)))
    errors: list[BaseException] = []
    reported_at = time.monotonic()

    async def worker() -> None:
        nonlocal num_taken, reported_at
        for index in waiting:
            if errors:
                return
            try:
                made[index] = await work(items[index])
                while num_taken in made:
                    take(made.pop(num_taken))
                    num_taken += 1
            except Exception as error:
                errors.append(error)
                return
            if time.monotonic() - reported_at >= REPORT_EVERY_S:
                reported_at = time.monotonic()
                report(num_taken + len(made))

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(items)))))
    if errors:
        raise errors[0]
    report(len(items))


async def all_of(works: Sequence[Callable[[], Awaitable[Made]]], *, at_once: bool) -> list[Made]:
    """What they make, in their order: one after the other, or at once. At once, all come to their end before the first error is raised."""
    if not at_once:
        return [await work() for work in works]
    made = await asyncio.gather(*(work() for work in works), return_exceptions=True)
    for each in made:
        if isinstance(each, BaseException):
            raise each
    return [each for each in made if not isinstance(each, BaseException)]
