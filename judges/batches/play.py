"""One batch, from its plan to its rows: handed over, waited for, read, and ended with its money in one transaction.

Whatever cannot be known is asked for again rather than guessed: a hand-over that was cut short is looked for at the vendor, rows that are
missing are read again, and what a lost row did cost stays set aside.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dpo_loop.errors import JudgeError, JudgeUnavailableError
from dpo_loop.progress import say
from dpo_loop.types import Message, Prompt
from judges.backend import JudgeRequest
from judges.batches.store import BatchStore, ended
from judges.batches.vendor import LATER, NEVER_RAN, BatchGoneError, BatchState, BatchVendor, Line, Look, Plan, Row
from judges.budget import Purse
from judges.config import ApiBatch, RemoteModel
from judges.dialect import Billing, Dialect, words_of
from judges.figures import spaced
from judges.prices import Price

LONGEST_S = 30 * 3600.0
"""A vendor answers a batch within a day or says that it expired."""
MOST_LOST = 0.01
"""Share of a batch's rows that may be missing for good."""
_ANY = JudgeRequest(key="", prompt=Prompt.build((Message(role="user", content="-"),), source="batch", tags={}), left="", right="")
"""For the usage in rows of calls that nobody asks here: a dead process did."""
Made = TypeVar("Made")


@dataclass(frozen=True)
class Desk:
    """What all batches of one judge share."""

    config: RemoteModel
    batch: ApiBatch
    dialect: Dialect
    vendor: BatchVendor
    purse: Purse
    store: BatchStore
    price: Price

    @property
    def priced(self) -> str | None:
        return None if self.config.free else self.config.model


@dataclass
class Played:
    """rows: by line, as far as they ran; None where the batch came to nothing. fatal: rows that say that no call can succeed; they are not kept.
    queue_is_full: words of a vendor that did not take the batch for now."""

    rows: dict[str, Row] | None
    fatal: dict[str, JudgeError] = field(default_factory=dict)
    queue_is_full: str = ""


class BatchPlay:
    """lines: of a batch that is sent here, emptied when it is; none for one of a process that is gone."""

    def __init__(self, desk: Desk, plan: Plan, lines: list[Line]) -> None:
        self._desk, self._plan, self._lines = desk, plan, lines
        self._is_sent_here = bool(lines)
        self._may_be_there = not lines
        self._strangers: set[str] = set()
        """Batches that were guessed to be this one and are not."""
        self._num_lost = 0

    async def play(self) -> Played:
        desk, plan = self._desk, self._plan
        if self._is_sent_here:
            most = sum(line.max_output_tokens for line in self._lines)
            made = desk.store.made(plan, self._lines)
            await desk.purse.reserve_batch(plan.id, desk.priced, plan.num_bytes, most, plan.num_lines, made)
        else:
            desk.purse.join_batch(plan.id)
        found, is_proven = plan.vendor_id, plan.vendor_id is not None
        while True:
            if desk.store.is_ended(plan):  # by another process
                return Played({})
            if found is None:
                found, is_proven = await self._vendor_id()
            if found is None:
                await self._drop()
                return Played(None)
            look = await self._until_ended(found)
            if look.state is BatchState.FAILED:
                await self._drop()
                if look.may_pass:
                    return Played(None, queue_is_full=look.words)
                raise JudgeError(f"batch {found} of judge {desk.dialect.where} was refused as a whole: {look.words}")
            rows = await self._read(found, look)
            if rows or is_proven:
                break
            self._strangers.add(found)
            found = None
        await desk.store.open(plan, found)
        fatal = await self._keep(rows)
        await desk.vendor.forget(found)
        num_ran = sum(row.status != NEVER_RAN for row in rows.values())
        if look.state is BatchState.CANCELLED and num_ran < plan.num_lines:
            raise JudgeError(
                f"batch {found} of judge {desk.dialect.where} was cancelled at the vendor ({look.words or 'no reason given'}) after {num_ran} of its "
                f"{plan.num_lines} calls, which are kept. Run the same command again to send the others anew."
            )
        return Played({line: row for line, row in rows.items() if row.status != NEVER_RAN}, fatal)

    # ---------------------------------------------------------------------------------------------------------- hand over

    async def _vendor_id(self) -> tuple[str | None, bool]:
        """The batch's id, and whether it is surely this one's; None for a batch of a dead process that never reached the vendor."""
        desk, started = self._desk, time.monotonic()
        while True:
            if self._may_be_there and (found := await self._find(until=time.time() + desk.batch.hand_over_s)):
                if not desk.vendor.guesses:
                    await desk.store.open(self._plan, found)
                return found, not desk.vendor.guesses
            if not self._is_sent_here:
                return None, False
            try:
                found = await desk.vendor.create(self._plan, self._lines)
            except JudgeUnavailableError as error:
                if time.monotonic() - started >= desk.config.outage_s:
                    raise
                say(f"judge: {error}")
                self._may_be_there = True
                continue
            except JudgeError as error:
                await self._drop()
                hint = " A server without a batch API needs `judge.batch` left out." if isinstance(error, BatchGoneError) else ""
                raise JudgeError(f"{error}{hint}") from error
            await desk.store.open(self._plan, found)
            self._lines.clear()
            return found, True

    async def _find(self, *, until: float) -> str | None:
        while True:
            known = self._desk.store.vendor_ids() | self._strangers
            found = await self._patiently(partial(self._desk.vendor.find, self._plan, known))
            left_s = until - time.time()
            if found is not None or left_s <= 0:
                return found
            await asyncio.sleep(min(self._desk.batch.poll_s, left_s))

    # --------------------------------------------------------------------------------------------------------------- wait

    async def _until_ended(self, vendor_id: str) -> Look:
        started, told = time.monotonic(), -1
        while True:
            look = await self._looked(vendor_id)
            if look.state is not BatchState.RUNNING:
                return look
            if time.time() - self._plan.made_at > LONGEST_S:
                raise JudgeUnavailableError(
                    f"batch {vendor_id} of judge {self._desk.dialect.where} has not ended in {LONGEST_S / 3600:.0f} hours. Run the same command "
                    f"again to go on waiting, or give it up: {self._give_up(vendor_id)}"
                )
            if (look.num_rows or 0) != told:
                told = look.num_rows or 0
                done = f"{spaced(told)} of {spaced(self._plan.num_lines)} calls"
                say(f"judge: batch {vendor_id} has answered {done} after {time.monotonic() - started:.0f} s")
            await asyncio.sleep(self._desk.batch.poll_s)

    async def _looked(self, vendor_id: str) -> Look:
        try:
            return await self._patiently(partial(self._desk.vendor.look, vendor_id))
        except BatchGoneError as error:
            raise JudgeError(
                f"{error}. It was sent from here: its results may be too old, or the key may be another project's. Use the key that sent it, or give "
                f"the batch up: {self._give_up(vendor_id)}"
            ) from error

    def _give_up(self, vendor_id: str) -> str:
        return f"--set 'judge.batch.give_up=[\"{vendor_id}\"]', which asks its calls anew and keeps its money set aside."

    async def _patiently(self, work: Callable[[], Awaitable[Made]]) -> Made:
        """Asked again through an outage of the vendor, up to outage_s: its batches go on meanwhile."""
        started = time.monotonic()
        while True:
            try:
                return await work()
            except JudgeUnavailableError as error:
                if time.monotonic() - started >= self._desk.config.outage_s:
                    raise
                say(f"judge: {error}")
            await asyncio.sleep(self._desk.batch.poll_s)

    # --------------------------------------------------------------------------------------------------------------- read

    async def _read(self, vendor_id: str, look: Look) -> dict[str, Row]:
        """The first row of each line of ours that ran; others where there is none. Read again until all are there that the vendor counts."""
        desk, started = self._desk, time.monotonic()
        ours = desk.store.lines_of(self._plan)
        while True:
            rows: dict[str, Row] = {}
            seen: set[str] = set()
            try:
                async for row in desk.vendor.rows(vendor_id):
                    seen.add(row.line)
                    if row.line in ours and (row.line not in rows or rows[row.line].status == NEVER_RAN):
                        rows[row.line] = row
                wanted = self._plan.num_lines if look.num_rows is None else look.num_rows
                num_lost = wanted - len(seen)
                words = f"judge {desk.dialect.where} hands out {len(seen)} of the {wanted} rows of batch {vendor_id}"
                error = JudgeUnavailableError(f"{words}. {LATER}")
            except JudgeUnavailableError as unavailable:
                num_lost, error = self._plan.num_lines, unavailable
            if num_lost <= 0:
                return rows
            if time.monotonic() - started >= desk.config.outage_s:
                if num_lost > max(1, MOST_LOST * self._plan.num_lines):
                    raise error
                self._num_lost = num_lost
                return rows
            say(f"judge: {error}")
            await asyncio.sleep(desk.batch.poll_s)
            look = await self._looked(vendor_id)

    async def _keep(self, rows: dict[str, Row]) -> dict[str, JudgeError]:
        """Rows and money in one transaction. Rows that say that no call can succeed are told and not kept, or each later run would hear them too."""
        desk, plan = self._desk, self._plan
        answers = [desk.dialect.read(row.payload, _ANY) for row in rows.values() if row.status == 200]
        settled = [answer.usage for answer in answers if answer.billing is Billing.SETTLED]
        desk.dialect.has_answered |= bool(settled)
        fatal: dict[str, JudgeError] = {}
        for row in rows.values():
            if row.status not in (200, NEVER_RAN):
                words = problem_of(row)
                try:
                    if not desk.dialect.is_about_lengths(row.status, words):
                        desk.dialect.of_error(row.status, words, {})
                except JudgeError as error:
                    fatal[row.line] = error
        kept = {line: row for line, row in rows.items() if row.status != NEVER_RAN and line not in fatal}
        num_unknown = len(answers) - len(settled) + self._num_lost
        if desk.priced is not None and settled:
            num_bytes = plan.num_bytes * len(settled) // plan.num_lines
            desk.purse.learn(desk.priced, num_bytes, sum(usage.input_tokens for usage in settled))
        await desk.purse.end_batch(
            plan.id,
            spent=sum(desk.price.of(usage, at_batch_price=True) for usage in settled),
            num_billed=len(answers) + self._num_lost,
            num_unknown=num_unknown,
            also=ended(plan, kept),
        )
        return fatal

    async def _drop(self) -> None:
        """It came to nothing."""
        await self._desk.purse.end_batch(self._plan.id, spent=0, num_billed=0, num_unknown=0, also=ended(self._plan, {}))


def problem_of(row: Row) -> str:
    """The provider's words in a row that is no reply."""
    try:
        return words_of(json.loads(row.payload))
    except ValueError:
        return row.payload.decode(errors="replace")
