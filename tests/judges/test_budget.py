"""A cap is never gone over, whatever is under way at once, whatever it turns out to cost and whoever dies."""

from __future__ import annotations

import asyncio
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_loop.errors import BudgetExceededError, InputError
from dpo_loop.types import Usage
from judges.accounts import Accounts, BudgetConfig
from judges.budget import Purse
from judges.ledger import Ledger
from judges.prices import NANO, Price, load_prices, to_nano

PRICES = "as_of: 2026-11-24\nmodels:\n  m: {input: 2.0, cached_input: 0.5, output: 8.0, batch: 0.5}\n"
BODY, OUTPUT = 2_500, 100
MOST_USD = (1_000 * 2 + OUTPUT * 8) / 1e6
"""Of one call with such a body: 1000 tokens in, 100 out."""


def accounts(folder: Path, *, round_number: int | None = 0, **caps: Any) -> Accounts:
    (folder / "prices.yaml").write_text(PRICES)
    return Accounts(folder / "ledger.sqlite", BudgetConfig(prices=str(folder / "prices.yaml"), **caps), round_number)


calls = st.lists(
    st.tuples(
        st.integers(0, 3 * BODY),
        st.integers(1, OUTPUT),
        st.sampled_from(["settle", "release", "keep"]),
        st.floats(0, 1),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(calls=calls, cap_nano=st.integers(0, to_nano(20 * MOST_USD)), cap_calls=st.integers(1, 30))
def test_concurrent_calls_of_two_processes_never_go_over_a_cap(calls: list[Any], cap_nano: int, cap_calls: int) -> None:
    """Usage is random, and at most the bound: reserved + spent + kept stays under the cap at every moment."""
    peaks: list[tuple[int, int]] = []

    async def main(folder: Path) -> None:
        ours = accounts(folder, usd_per_run=cap_nano / NANO, calls_per_round=cap_calls)
        with Ledger(ours.ledger) as one, Ledger(ours.ledger) as other:
            purses = [await Purse.open(one, ours), await Purse.open(other, ours)]

            async def call(number: int, size: int, output: int, end: str, share: float, ticks: int) -> None:
                try:
                    reservation = await purses[number % 2].reserve("m", size, output)
                except BudgetExceededError:
                    return
                peaks.append(one.read(_totals))
                for _ in range(ticks):
                    await asyncio.sleep(0)
                if end == "settle":
                    used = Usage(input_tokens=int(share * -(-size * 2 // 5)), output_tokens=int(share * output))
                    await reservation.settle(used)
                else:
                    await (reservation.release() if end == "release" else reservation.keep())
                peaks.append(one.read(_totals))

            await asyncio.gather(*(call(number, *each) for number, each in enumerate(calls)))

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(Path(folder)))
    assert all(nano <= cap_nano and num <= cap_calls for nano, num in peaks)


def _totals(db: Any) -> tuple[int, int]:
    row = db.execute("SELECT sum(reserved_nano + spent_nano + kept_nano), sum(calls) FROM money").fetchone()
    return int(row[0]), int(row[1])


def test_a_call_waits_for_those_under_way_and_goes_when_they_cost_less(tmp_path: Path) -> None:
    async def main() -> None:
        ours = accounts(tmp_path, usd_per_run=MOST_USD)
        with Ledger(ours.ledger) as ledger:
            purse = await Purse.open(ledger, ours)
            first = await purse.reserve("m", BODY, OUTPUT)
            second = asyncio.create_task(purse.reserve("m", BODY // 2, OUTPUT // 2))
            await asyncio.sleep(0.02)
            assert not second.done()
            await first.settle(Usage(input_tokens=100, output_tokens=1))
            await (await second).keep()
            with pytest.raises(BudgetExceededError, match=r"budget\.usd_per_run"):
                await purse.reserve("m", BODY, OUTPUT)

    asyncio.run(main())


def test_a_raised_cap_lets_the_run_go_on_and_a_round_has_its_own(tmp_path: Path) -> None:
    async def main(round_number: int, cap: int) -> None:
        ours = accounts(tmp_path, round_number=round_number, calls_per_round=cap)
        with Ledger(ours.ledger) as ledger:
            await (await (await Purse.open(ledger, ours)).reserve(None, BODY, OUTPUT)).keep()

    asyncio.run(main(0, 1))
    with pytest.raises(BudgetExceededError, match=r"calls_per_round: 1 calls") as caught:
        asyncio.run(main(0, 1))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    asyncio.run(main(1, 1))
    asyncio.run(main(0, 2))


def test_what_a_dead_process_had_set_aside_counts_and_is_shown(tmp_path: Path) -> None:
    async def main() -> None:
        ours = accounts(tmp_path, usd_per_run=1.5 * MOST_USD)
        with Ledger(ours.ledger) as dead:
            await (await Purse.open(dead, ours)).reserve("m", BODY, OUTPUT)
        with Ledger(ours.ledger) as ledger:
            purse = await Purse.open(ledger, ours)
            run = purse.figures()["run"]
            assert run == {"spent_usd": 0.0, "under_way_usd": 0.0, "never_settled_usd": pytest.approx(MOST_USD), "calls": 1}
            with pytest.raises(BudgetExceededError):
                await purse.reserve("m", BODY, OUTPUT)

    asyncio.run(main())


def test_a_cancelled_request_for_money_leaves_nothing_behind(tmp_path: Path) -> None:
    async def main(ticks: int) -> None:
        ours = accounts(tmp_path, usd_per_run=MOST_USD)
        with Ledger(ours.ledger) as ledger:
            purse = await Purse.open(ledger, ours)
            asking = asyncio.create_task(purse.reserve("m", BODY, OUTPUT))
            for _ in range(ticks):
                await asyncio.sleep(0)
            cancelled = asking.cancel()
            (made,) = await asyncio.gather(asking, return_exceptions=True)
            if not cancelled:
                assert not isinstance(made, BaseException)
                await made.release()
            await (await purse.reserve("m", BODY, OUTPUT)).release()

    for ticks in range(6):
        asyncio.run(main(ticks))


def test_usage_above_the_bound_is_counted_whole_and_raises_the_next_bound(tmp_path: Path) -> None:
    async def main() -> None:
        ours = accounts(tmp_path, usd_per_run=10 * MOST_USD)
        with Ledger(ours.ledger) as ledger:
            purse = await Purse.open(ledger, ours)
            one = await purse.reserve("m", BODY, OUTPUT)
            before = one.nano
            paid = await one.settle(Usage(input_tokens=3_000, output_tokens=OUTPUT))
            assert paid == pytest.approx((3_000 * 2 + OUTPUT * 8) / 1e6)
            two = await purse.reserve("m", BODY, OUTPUT)
            assert two.nano > before * 2
            await two.release()

    asyncio.run(main())


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**5), st.booleans())
def test_a_price_is_exact_to_the_nano_dollar_and_rounds_up(tokens: int, cached: int, output: int, batch: bool) -> None:
    price = Price(input=1.25, cached_input=0.125, output=10.0, batch=0.5)
    usage = Usage(input_tokens=tokens + cached, cached_input_tokens=cached, output_tokens=output)
    twice = tokens * 2_500 + cached * 250 + output * 20_000
    assert price.of(usage, at_batch_price=batch) == (-(-twice // 4) if batch else twice // 2)
    assert price.of(usage, at_batch_price=batch) <= price.most(tokens + cached, output, at_batch_price=batch)


def test_a_model_without_a_price_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"free: true"):
        load_prices().of("nobody-knows")
    (tmp_path / "bad.yaml").write_text("as_of: 2026-01-01\nmodels: {m: {input: -1, output: 2}}\n")
    with pytest.raises(InputError, match=r"models\.m\.input"):
        BudgetConfig(prices=str(tmp_path / "bad.yaml")).price_list()
