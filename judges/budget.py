"""Caps on what judging may cost: money is set aside before a call is sent and counted after it came back.

    reserved    set aside for calls under way: the most that they can cost
    spent       what settled calls did cost
    kept        set aside for calls whose end nobody knows (time-out, dropped connection): it may have been billed

A cap holds for reserved + spent + kept, over all processes of the run: the totals are rows of the ledger's file, changed in its
transactions, one row per owner (an open ledger) and round. What a killed process had reserved stays in its row, so it counts for
ever: its calls may have been billed. A batch has a row of its own, so that whoever reads it, in whatever process, ends what was reserved.

A call that would go over a cap waits while calls of this process are under way, since most of them settle lower than they were
reserved; when none is left it is refused. It does not wait for other processes, of which it cannot know how long they take.

The bound of a call is its input at bytes / 2.5 tokens plus all the output it may have. Usage above it raises the ratio for all later
calls, and is counted whole: the cap can then be exceeded by no more than the excess of the calls that were under way already.
"""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dpo_loop.errors import BudgetExceededError
from dpo_loop.types import Usage
from judges.accounts import Accounts
from judges.ledger import Ledger
from judges.prices import FREE, Price, to_nano, to_usd

BYTES_PER_TOKEN = 2.5
"""Of the request's body; few tokenisers do worse on any text, and what does is learnt from usage."""
HEADROOM = 1.05
"""On a ratio that was learnt from one call, for the next one."""
NO_ROUND = -1
BATCH_PREFIX = "batch "
"""Of a row that a batch owns, before the id of its plan."""
Change = Callable[[sqlite3.Connection], None]

_TABLE = """
CREATE TABLE IF NOT EXISTS money (
  owner TEXT NOT NULL,
  round INTEGER NOT NULL,
  reserved_nano INTEGER NOT NULL DEFAULT 0 CHECK (reserved_nano >= 0),
  spent_nano INTEGER NOT NULL DEFAULT 0 CHECK (spent_nano >= 0),
  kept_nano INTEGER NOT NULL DEFAULT 0,
  calls INTEGER NOT NULL DEFAULT 0 CHECK (calls >= 0),
  PRIMARY KEY (owner, round)
) WITHOUT ROWID
"""
_CHANGE = """
UPDATE money SET reserved_nano = reserved_nano + ?, spent_nano = spent_nano + ?, kept_nano = kept_nano + ?, calls = calls + ?
WHERE owner = ? AND round = ?
"""
_END_BATCH = """
UPDATE money SET reserved_nano = 0, spent_nano = ?, kept_nano = reserved_nano / max(1, calls) * ?, calls = ? WHERE owner = ?
"""
_TOTALS = """
SELECT total(reserved_nano + spent_nano + kept_nano), total(calls), total((reserved_nano + spent_nano + kept_nano) * (round = :round)),
       total(calls * (round = :round)) FROM money
"""
_FIGURES = "SELECT owner, round, reserved_nano, spent_nano, kept_nano, calls FROM money ORDER BY owner, round"


@dataclass(frozen=True, slots=True)
class Totals:
    """Nano-dollars and calls of one owner in one round."""

    reserved: int = 0
    spent: int = 0
    kept: int = 0
    calls: int = 0


class Purse:
    """The money of one open ledger. Of one event loop."""

    def __init__(self, ledger: Ledger, accounts: Accounts) -> None:
        self._ledger, self._budget = ledger, accounts.budget
        self._round = NO_ROUND if accounts.round_number is None else accounts.round_number
        self._prices = accounts.budget.price_list()
        self._ratios: dict[str, float] = {}
        self._under_way = 0
        self._batches: set[str] = set()
        """Plans that are under way here."""
        self._in_line = asyncio.Lock()
        self._changed = asyncio.Event()

    @classmethod
    async def open(cls, ledger: Ledger, accounts: Accounts) -> Purse:
        """Raises InputError if the price list cannot be read."""
        purse = cls(ledger, accounts)

        def make_row(db: sqlite3.Connection) -> None:
            db.execute(_TABLE)
            db.execute("INSERT OR IGNORE INTO money (owner, round) VALUES (?, ?)", (ledger.owner, purse._round))

        await ledger.write(make_row)
        return purse

    def price_of(self, model: str) -> Price:
        """Raises InputError for a model that is not in the price list; to be asked before the first call."""
        return self._prices.of(model)

    async def reserve(self, model: str | None, body_bytes: int, max_output_tokens: int) -> Reservation:
        """Set aside the most that a call can cost.

        model None costs nothing and counts as calls only. Raises BudgetExceededError before anything is sent, and InputError for a
        model without a price.
        """
        return await self._reserve(Reservation(self, model, self._price(model), body_bytes, max_output_tokens))

    async def reserve_batch(
        self, plan: str, model: str | None, body_bytes: int, max_output_tokens: int, num: int, also: Change
    ) -> None:
        """Set aside the most that a batch can cost, of all its calls together, and make `also` in the same transaction.

        It counts as under way until `leave_batch`; its money stays set aside until `end_batch`, here or in another process.
        """
        made = Reservation(
            self, model, self._price(model), body_bytes, max_output_tokens, num=num, owner=BATCH_PREFIX + plan, also=also
        )
        await self._reserve(made)
        self._batches.add(plan)

    def join_batch(self, plan: str) -> None:
        """One that a process which is gone has reserved is under way here."""
        if plan not in self._batches:
            self._batches.add(plan)
            self._under_way += 1

    def leave_batch(self, plan: str) -> None:
        """It ended, or cannot be waited for here: whoever waits for room looks again."""
        if plan in self._batches:
            self._batches.discard(plan)
            self._under_way -= 1
            self._changed.set()

    async def end_batch(
        self, plan: str, *, spent: int, num_billed: int, num_unknown: int, also: Callable[[sqlite3.Connection], bool]
    ) -> None:
        """Nano-dollars that its answered calls cost, and how many may have cost something else. also: the end of the batch itself, in the same
        transaction; False where another process has ended it, and its money with it."""

        def work(db: sqlite3.Connection) -> None:
            if also(db):
                db.execute(_END_BATCH, (spent, num_unknown, num_billed, BATCH_PREFIX + plan))

        await self._ledger.write(work)
        self.leave_batch(plan)

    def _price(self, model: str | None) -> Price:
        return FREE if model is None else self._prices.of(model)

    async def _reserve(self, made: Reservation) -> Reservation:
        try:
            await self._wait_for_room(made)
        except BaseException:
            self._give_up(made)
            raise
        return made

    async def _wait_for_room(self, made: Reservation) -> None:
        if await self._attempt(made) is None:
            return
        async with self._in_line:
            while True:
                self._changed.clear()
                over = await self._attempt(made)
                if over is None:
                    return
                if self._under_way == 0 and not self._changed.is_set():
                    raise BudgetExceededError(over)
                await self._changed.wait()

    def figures(self) -> dict[str, Any]:
        """Of the run and of this round, in dollars. never_settled: kept, and reserved by processes that are gone."""
        rows = self._ledger.read(lambda db: db.execute(_FIGURES).fetchall())
        return {
            "run": self._sum(rows),
            "round": self._sum([row for row in rows if row[1] == self._round]),
            "prices_as_of": self._prices.as_of.isoformat(),
        }

    def _sum(self, rows: list[tuple[str, int, int, int, int, int]]) -> dict[str, Any]:
        never = sum(row[4] + (0 if row[0].startswith(BATCH_PREFIX) or self._ledger.is_alive(row[0]) else row[2]) for row in rows)
        return {
            "spent_usd": to_usd(sum(row[3] for row in rows)),
            "under_way_usd": to_usd(sum(row[2] + row[4] for row in rows) - never),
            "never_settled_usd": to_usd(never),
            "calls": sum(row[5] for row in rows),
        }

    # ------------------------------------------------------------------------------------------------------------ totals

    async def _attempt(self, made: Reservation) -> str | None:
        """None if the money was set aside, else why not."""
        made.nano = self._bound(made)

        def work(db: sqlite3.Connection) -> str | None:
            run_nano, run_calls, round_nano, round_calls = map(int, db.execute(_TOTALS, {"round": self._round}).fetchone())
            if made.state == "ended":
                return None
            over = (
                _over(self._budget.usd_per_run, run_nano, made.nano, "usd_per_run", made.num)
                or _over(self._budget.usd_per_round, round_nano, made.nano, "usd_per_round", made.num)
                or _over(self._budget.calls_per_run, run_calls, made.num, "calls_per_run", made.num)
                or _over(self._budget.calls_per_round, round_calls, made.num, "calls_per_round", made.num)
            )
            if over is None:
                if made.owner:
                    db.execute("INSERT OR IGNORE INTO money (owner, round) VALUES (?, ?)", (made.owner, self._round))
                self._change(db, made.owner, Totals(reserved=made.nano, calls=made.num))
                if made.also is not None:
                    made.also(db)
                made.state = "open"
                self._under_way += 1
            return over

        return await self._ledger.write(work)

    def _give_up(self, made: Reservation) -> None:
        """Of one that was cancelled or refused while it asked for room: what is queued for it does nothing, what was set aside goes back."""
        if made.state == "open":
            self.end(Totals(reserved=-made.nano, calls=-made.num), made.owner)
        made.state = "ended"

    def _bound(self, made: Reservation) -> int:
        ratio = self._ratios.get(made.model or "", 1.0)
        input_tokens = math.ceil(made.body_bytes / BYTES_PER_TOKEN * ratio)
        return made.price.most(input_tokens, made.max_output_tokens, at_batch_price=bool(made.owner))

    def end(self, change: Totals, owner: str = "") -> None:
        """Of one reservation. Not waited for: it goes into the transaction that keeps the reply, and if that fails, the money stays set aside."""

        def work(db: sqlite3.Connection) -> None:
            self._change(db, owner, change)
            self._under_way -= 1
            self._changed.set()

        self._ledger.queue(work)

    def learn(self, model: str, body_bytes: int, input_tokens: int) -> None:
        """From usage that was above the bound."""
        seen = input_tokens / max(1.0, body_bytes / BYTES_PER_TOKEN)
        if seen > self._ratios.get(model, 1.0):
            self._ratios[model] = seen * HEADROOM

    def _change(self, db: sqlite3.Connection, owner: str, by: Totals) -> None:
        db.execute(_CHANGE, (by.reserved, by.spent, by.kept, by.calls, owner or self._ledger.owner, self._round))


@dataclass(eq=False, slots=True)
class Reservation:
    """Ends with exactly one of `settle`, `release`, `keep`. Held by a process that dies, it is as good as kept."""

    purse: Purse
    model: str | None
    price: Price
    body_bytes: int
    max_output_tokens: int
    num: int = 1
    owner: str = ""
    """Of a batch's row; "": this process's."""
    also: Change | None = None
    nano: int = 0
    state: Literal["asked", "open", "ended"] = "asked"

    async def settle(self, usage: Usage) -> float:
        """The dollars that the usage costs, also above what was reserved."""
        cost = self.price.of(usage)
        if self.model is not None:
            self.purse.learn(self.model, self.body_bytes, usage.input_tokens)
        await self._end(Totals(reserved=-self.nano, spent=cost))
        return to_usd(cost)

    async def release(self) -> None:
        """Nothing was sent, or the vendor refused it before any work."""
        await self._end(Totals(reserved=-self.nano, calls=-self.num))

    async def keep(self) -> None:
        """It may have been billed."""
        await self._end(Totals(reserved=-self.nano, kept=self.nano))

    async def _end(self, change: Totals) -> None:
        assert self.state == "open", "a reservation ends once"
        self.state = "ended"
        self.purse.end(change)


def _over(cap: float | int | None, taken: int, asked: int, key: str, num: int) -> str | None:
    """A sentence if `asked` more, of `num` calls, would be over the cap. Dollars are counted in nano-dollars."""
    if cap is None:
        return None
    is_money = key.startswith("usd")
    if taken + asked <= (to_nano(cap) if is_money else cap):
        return None
    show: Callable[[float], str] = (lambda nano: f"${to_usd(int(nano)):.4f}") if is_money else (lambda calls: f"{int(calls)} calls")
    limit = f"${cap:.4f}" if is_money else f"{int(cap)} calls"
    what, other = ("call", "") if num == 1 else (f"batch of {num} calls", ", or lower judge.batch.max_calls,")
    return (
        f"the next {what} could go over budget.{key}: {limit}; {show(taken)} are spent or set aside and the {what} may need {show(asked)}. "
        f"Nothing was sent. Raise budget.{key}{other} and run the same command again: every answered call is kept."
    )
