"""Attempts as lines of batches: gathered until no more come, sent as one, waited for, handed out.

    a line is asked for  ─►  its row is in the ledger's file                   handed out, nothing is sent
                             it sits in a batch of a process that is gone      that batch is waited for
                             neither                                           it goes into the next batch

A plan is written down, with its money, before it is sent; its rows are written down, and its money ended, in one transaction. So after a kill
at any moment a batch is found again, at the vendor where its id was not written down, and no call of it is paid twice.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dpo_loop.errors import JudgeError, JudgeUnavailableError
from dpo_loop.progress import say
from dpo_loop.types import Message, Prompt
from judges.backend import JudgeRequest
from judges.batches.store import BatchStore, dropped, kept, made
from judges.batches.vendor import NEVER_RAN, NOT_TAKEN, BatchState, BatchVendor, Line, Look, Plan, Row, line_id
from judges.budget import Purse
from judges.config import ApiBatch, RemoteJudge, VllmRunBatch
from judges.dialect import Answer, Billing, Dialect, unavailable, words_of
from judges.direct import num_bytes
from judges.figures import spaced
from judges.ledger import Ledger
from judges.prices import FREE, to_usd
from judges.remote import Call

MOST_EXPIRIES = 3
_ANY = JudgeRequest(key="", prompt=Prompt.build((Message(role="user", content="-"),), source="batch", tags={}), left="", right="")
"""For the usage in rows of calls that nobody asks here: a dead process did."""
Made = TypeVar("Made")


@dataclass
class _Waiting:
    """Who waits for the rows of one batch, by line."""

    task: asyncio.Task[None] | None = None
    rows: dict[str, asyncio.Future[Row]] = field(default_factory=dict)


class BatchSender:
    """Of one event loop. Raises InputError for a model without a price."""

    in_waves = True

    def __init__(
        self,
        config: RemoteJudge,
        batch: ApiBatch | VllmRunBatch,
        dialect: Dialect,
        vendor: BatchVendor,
        purse: Purse,
        ledger: Ledger,
    ) -> None:
        self._config, self._batch, self._dialect, self._vendor, self._purse = config, batch, dialect, vendor, purse
        self._priced = None if config.free else config.model
        self._price = FREE if self._priced is None else purse.price_of(self._priced)
        self._store = BatchStore(ledger)
        self._gathered: dict[str, Line] = {}
        self._gathered_bytes = 0
        self._next = _Waiting()
        self._quiet: asyncio.TimerHandle | None = None
        self._open: dict[str, _Waiting] = {}
        self._strangers: set[str] = set()
        """Batches that were guessed to be ours and are not."""

    @property
    def concurrency(self) -> int:
        return self._batch.max_calls

    def pause_s(self, call: Call, answer: Answer) -> float:  # noqa: ARG002 - a batch is pause enough
        return 0.0

    def end(self, call: Call) -> None:
        self._store.forget(call.request.key)

    async def aclose(self) -> None:
        """Batches that are open stay so, for the next process."""
        if self._quiet is not None:
            self._quiet.cancel()
        tasks = [waiting.task for waiting in self._open.values() if waiting.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._vendor.aclose()

    async def attempt(self, call: Call, *, timeout_s: float) -> Answer:  # noqa: ARG002 - the vendor's window is the deadline
        call.started = call.started or time.monotonic()
        call.attempts += 1
        request = call.request
        body = self._dialect.as_sent(self._dialect.body(request, call.max_output_tokens))
        line = Line(line_id(request.key, call.attempts), request.key, body, call.max_output_tokens)
        num_expired = 0
        while (row := await self._row_of(line)).status in (NEVER_RAN, NOT_TAKEN):
            num_expired += row.status == NEVER_RAN
            if num_expired == MOST_EXPIRIES:
                return Answer(unavailable(f"the vendor did not get to it in {MOST_EXPIRIES} batches"), is_hopeless=True)
        answer = self._answer(row, request)
        call.count(answer.usage, to_usd(self._price.of(answer.usage, at_batch_price=True)))
        return answer

    def _answer(self, row: Row, request: JudgeRequest) -> Answer:
        if row.status == 200:
            return self._dialect.read(row.payload, request)
        try:
            problem = json.loads(row.payload)
        except ValueError:
            problem = row.payload.decode(errors="replace")
        words = words_of(problem)
        if self._dialect.is_about_lengths(row.status, words):
            return Answer(unavailable(words), billing=Billing.NOTHING)
        return self._dialect.of_error(row.status, words, {})

    # ---------------------------------------------------------------------------------------------------------- gathering

    async def _row_of(self, line: Line) -> Row:
        known = self._store.find(line.id)
        if isinstance(known, Row):
            return known
        waiting = self._next if known is None else self._join(known)
        row = waiting.rows.setdefault(line.id, asyncio.get_running_loop().create_future())
        if known is None:
            self._gather(line)
        return await row

    def _gather(self, line: Line) -> None:
        size = num_bytes(dict(line.body)) + 200
        if self._gathered and self._gathered_bytes + size > self._vendor.most_bytes:
            row = self._next.rows.pop(line.id)
            self._send_gathered()
            self._next.rows[line.id] = row
        self._gathered[line.id] = line
        self._gathered_bytes += size
        if self._quiet is not None:
            self._quiet.cancel()
        if len(self._gathered) >= self._batch.max_calls:
            self._send_gathered()
        else:
            self._quiet = asyncio.get_running_loop().call_later(self._batch.gather_s, self._send_gathered)

    def _send_gathered(self) -> None:
        lines, size, waiting = list(self._gathered.values()), self._gathered_bytes, self._next
        self._gathered, self._gathered_bytes, self._next = {}, 0, _Waiting()
        plan = self._store.new_plan(lines, size)
        self._start(plan, waiting, lines)

    def _join(self, plan: Plan) -> _Waiting:
        """The batch of a process that is gone, or of this one."""
        if plan.id not in self._open:
            self._start(plan, _Waiting(), None)
        return self._open[plan.id]

    def _start(self, plan: Plan, waiting: _Waiting, lines: Sequence[Line] | None) -> None:
        self._open[plan.id] = waiting
        waiting.task = asyncio.create_task(self._play(plan, waiting, lines))

    # -------------------------------------------------------------------------------------------------------- one batch

    async def _play(self, plan: Plan, waiting: _Waiting, lines: Sequence[Line] | None) -> None:
        """From its plan to its rows; whoever waits for one gets it, or hears what went wrong."""
        try:
            rows = await self._rows(plan, lines)
        except BaseException as error:
            del self._open[plan.id]
            for row in waiting.rows.values():
                if not row.done():
                    row.cancel() if isinstance(error, asyncio.CancelledError) else row.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        del self._open[plan.id]
        for line, row in waiting.rows.items():
            if not row.done():
                row.set_result(Row(line, NOT_TAKEN) if rows is None else rows.get(line, Row(line, NEVER_RAN)))

    async def _rows(self, plan: Plan, lines: Sequence[Line] | None) -> dict[str, Row] | None:
        """By line, as far as they ran; None where the batch came to nothing."""
        if lines is not None:
            most = sum(line.max_output_tokens for line in lines)
            await self._purse.reserve_batch(plan.id, self._priced, plan.num_bytes, most, plan.num_lines, made(plan, lines))
        while True:
            vendor_id = plan.vendor_id or await self._vendor_id(plan, lines)
            if vendor_id is None:
                await self._drop(plan)
                return None
            is_proven = plan.vendor_id is not None or lines is not None or not self._vendor.guesses
            look = await self._until_ended(plan, vendor_id)
            if look.state is BatchState.FAILED:
                await self._drop(plan)
                if not look.may_pass:
                    raise JudgeError(f"batch {vendor_id} of judge {self._dialect.where} was refused as a whole: {look.words}")
                say(f"judge: batch {vendor_id} was not taken ({look.words}); its calls go into another one")
                await asyncio.sleep(self._batch.poll_s)
                return None
            rows = await self._patiently(partial(self._read, plan, vendor_id))
            if rows or is_proven:
                break
            self._strangers.add(vendor_id)
        await self._store.open(plan, vendor_id)
        await self._keep(plan, rows)
        if look.state is BatchState.CANCELLED and len(rows) < plan.num_lines:
            raise JudgeError(
                f"batch {vendor_id} of judge {self._dialect.where} was cancelled at the vendor ({look.words or 'no reason given'}) after {len(rows)} of "
                f"its {plan.num_lines} calls, which are kept. Run the same command again to send the others anew."
            )
        return rows

    async def _vendor_id(self, plan: Plan, lines: Sequence[Line] | None) -> str | None:
        """Of a batch that is sent here, or was sent by a process that is gone; None if that one never sent it."""
        found = None
        if lines is None:
            found = await self._find(plan, until=plan.made_at + self._batch.hand_over_s)
        else:
            started = time.monotonic()
            while found is None:
                try:
                    found = await self._vendor.create(plan, lines)
                except JudgeUnavailableError as error:
                    if time.monotonic() - started >= self._config.outage_s:
                        raise
                    say(f"judge: {error}")
                    # It may have been made all the same: looked for until it would have appeared.
                    found = await self._find(plan, until=time.time() + self._batch.hand_over_s)
                except JudgeError:
                    await self._drop(plan)
                    raise
        if found is not None and (lines is not None or not self._vendor.guesses):
            await self._store.open(plan, found)
        return found

    async def _find(self, plan: Plan, *, until: float) -> str | None:
        while True:
            known = self._store.vendor_ids() | self._strangers
            found = await self._patiently(partial(self._vendor.find, plan, known))
            left_s = until - time.time()
            if found is not None or left_s <= 0:
                return found
            await asyncio.sleep(min(self._batch.poll_s, left_s))

    async def _until_ended(self, plan: Plan, vendor_id: str) -> Look:
        started = time.monotonic()
        while True:
            look = await self._patiently(partial(self._vendor.look, vendor_id))
            if look.state is not BatchState.RUNNING:
                return look
            done = f"{spaced(look.num_done)} of {spaced(plan.num_lines)} calls"
            say(f"judge: batch {vendor_id} has answered {done} after {time.monotonic() - started:.0f} s")
            await asyncio.sleep(self._batch.poll_s)

    async def _read(self, plan: Plan, vendor_id: str) -> dict[str, Row]:
        """The first row of each line of ours that ran; others where there is none."""
        ours = self._store.lines_of(plan)
        rows: dict[str, Row] = {}
        async for row in self._vendor.rows(vendor_id):
            if row.line in ours and (row.line not in rows or rows[row.line].status == NEVER_RAN):
                rows[row.line] = row
        return rows

    async def _keep(self, plan: Plan, rows: dict[str, Row]) -> None:
        """Rows and money in one transaction."""
        ran = {line: row for line, row in rows.items() if row.status != NEVER_RAN}
        answers = [self._dialect.read(row.payload, _ANY) for row in ran.values() if row.status == 200]
        self._dialect.has_answered |= bool(answers)
        settled = [answer.usage for answer in answers if answer.billing is Billing.SETTLED]
        spent = sum(self._price.of(usage, at_batch_price=True) for usage in settled)
        num_unknown = len(answers) - len(settled)
        await self._purse.end_batch(plan.id, spent=spent, num_billed=len(answers), num_unknown=num_unknown, also=kept(plan, ran))

    async def _drop(self, plan: Plan) -> None:
        await self._purse.end_batch(plan.id, spent=0, num_billed=0, num_unknown=0, also=dropped(plan))

    async def _patiently(self, work: Callable[[], Awaitable[Made]]) -> Made:
        """Asked again through an outage of the vendor, up to outage_s: its batches go on meanwhile."""
        started = time.monotonic()
        while True:
            try:
                return await work()
            except JudgeUnavailableError as error:
                if time.monotonic() - started >= self._config.outage_s:
                    raise
                say(f"judge: {error}")
            await asyncio.sleep(self._batch.poll_s)
