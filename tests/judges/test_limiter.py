"""How many calls at once, and when: what the limiter does at each report."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from judges.limiter import CATCH_UP_S, CUT, FEWEST_FAILURES, PACE, Limiter, Slot, limiter_of


def limit_of(limiter: Limiter) -> int:
    return int(limiter.figures()["concurrency"])


async def hold(limiter: Limiter, num: int, then: Callable[[Slot], None]) -> None:
    """`num` calls under way at once, each of which reports `then`."""
    async with AsyncExitStack() as stack:
        slots = [await stack.enter_async_context(limiter.slot()) for _ in range(num)]
        for slot in slots:
            then(slot)


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(10):
            await work()

    asyncio.run(main())


def test_it_doubles_until_the_first_cut_and_then_grows_by_one() -> None:
    async def work() -> None:
        limiter = Limiter(start=2, most=20)
        seen = []
        for _ in range(4):
            await hold(limiter, limit_of(limiter), Slot.succeeded)
            seen.append(limit_of(limiter))
        assert seen == [4, 8, 16, 20]
        await hold(limiter, 20, lambda slot: slot.rate_limited(None))
        assert limit_of(limiter) == int(CUT * 20)
        await hold(limiter, 14, Slot.succeeded)
        assert limit_of(limiter) == 15

    run(work)


def test_one_episode_is_one_cut_and_is_reckoned_from_what_was_under_way() -> None:
    async def work() -> None:
        limiter = Limiter(start=64, most=64)
        await hold(limiter, 10, lambda slot: slot.rate_limited(None))
        assert limit_of(limiter) == int(CUT * 10)
        await hold(limiter, 7, lambda slot: slot.rate_limited(None))
        assert limit_of(limiter) == int(CUT * 7)
        for _ in range(9):
            await hold(limiter, 1, lambda slot: slot.rate_limited(None))
        assert limit_of(limiter) == 1, "it never stops for good"
        assert limiter.figures()["rate_limited"] == 26

    run(work)


def test_all_wait_as_long_as_one_was_told_to() -> None:
    async def work() -> None:
        limiter = Limiter(start=8, most=8)
        await hold(limiter, 1, lambda slot: slot.rate_limited(0.3))
        started = time.monotonic()
        await asyncio.gather(*(hold(limiter, 1, Slot.succeeded) for _ in range(5)))
        assert time.monotonic() - started >= 0.29

    run(work)


def test_calls_that_wait_together_are_sent_spread_over_the_time_a_call_takes() -> None:
    async def work() -> None:
        limiter, takes_s = Limiter(start=10, most=10), 1.0
        entered: list[float] = []

        async def call() -> None:
            async with limiter.slot() as slot:
                entered.append(time.monotonic())
                await asyncio.sleep(takes_s)
                slot.succeeded()

        await call()
        await asyncio.gather(*(call() for _ in range(10)))
        first, *others = sorted(entered)[1:]
        assert others[-1] - first >= PACE * takes_s * 9 / 10 - CATCH_UP_S
        assert others[-1] - first < takes_s, "pacing keeps no call waiting for another's end"

    run(work)


def test_a_server_that_is_down_is_only_probed_until_it_answers() -> None:
    async def work() -> None:
        limiter = Limiter(start=4, most=4)
        for _ in range(FEWEST_FAILURES):
            assert not limiter.is_open
            await hold(limiter, 1, lambda slot: slot.failed(None))
        assert limiter.is_open
        assert limiter.is_silent
        assert limiter.troubled_since is not None
        num_entered = 0
        seen: list[int] = []

        async def call() -> None:
            nonlocal num_entered
            async with limiter.slot() as slot:
                num_entered += 1
                await asyncio.sleep(0.02)
                seen.append(num_entered)
                slot.succeeded()

        waiting = [asyncio.create_task(call()) for _ in range(8)]
        await asyncio.sleep(0.5)
        assert num_entered == 0, "a probe goes out only after a pause"
        await asyncio.gather(*waiting)
        assert seen[0] == 1, "nobody else goes before the probe came back"
        assert seen[1] == 1 + 4
        assert not limiter.is_open
        assert limiter.troubled_since is None
        assert limiter.figures()["outages"] == 1

    run(work)


def test_rate_limits_do_not_open_the_circuit() -> None:
    async def work() -> None:
        limiter = Limiter(start=4, most=4)
        for _ in range(3 * FEWEST_FAILURES):
            await hold(limiter, 1, lambda slot: slot.rate_limited(None))
        assert not limiter.is_open

    run(work)


reports = st.sampled_from(["succeeded", "failed", "rate_limited", "nothing", "cancelled early", "cancelled late"])


@settings(max_examples=50, deadline=None)
@given(st.lists(reports, max_size=8), st.integers(1, 4))
def test_whatever_happens_to_calls_every_place_is_given_back(what: list[str], most: int) -> None:
    async def work() -> None:
        limiter = Limiter(start=most, most=most)
        at_once = 0

        async def call(report: str) -> None:
            nonlocal at_once
            async with limiter.slot() as slot:
                at_once += 1
                assert at_once <= most
                try:
                    await asyncio.sleep(0)
                finally:
                    at_once -= 1
                if report == "rate_limited" or report == "failed":
                    getattr(slot, report)(None)
                elif report == "succeeded":
                    slot.succeeded()

        tasks = [asyncio.create_task(call(report)) for report in what]
        for ticks, early in ((1, "cancelled early"), (1, "cancelled late")):
            for _ in range(ticks):
                await asyncio.sleep(0)
            for task, report in zip(tasks, what, strict=True):
                if report == early:
                    task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await hold(limiter, limit_of(limiter), Slot.succeeded)

    run(work)


def test_judges_of_one_model_at_one_place_share_their_turns() -> None:
    async def work() -> None:
        one = limiter_of("http://x", "m", start=1, most=2)
        assert limiter_of("http://x", "m", start=5, most=9) is one
        assert limiter_of("http://x", "other", start=1, most=2) is not one

    run(work)


@pytest.mark.parametrize("start", [1, 50])
def test_it_never_starts_above_the_most(start: int) -> None:
    assert limit_of(Limiter(start=start, most=7)) == min(start, 7)
