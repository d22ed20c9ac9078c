"""Attempts as lines of batches: gathered until no more come, sent as one, waited for, handed out.

    a line is asked for  ─►  its row is in the ledger's file                   handed out, nothing is sent
                             it sits in a batch that has not ended             that batch is waited for
                             neither                                           it goes into the next batch

A plan is written down, with its money, before it is sent; its rows are written down, and its money ended, in one transaction. So after a kill
at any moment a batch is found again: at the vendor, where its id was not written down.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field, replace

from dpo_loop.errors import JudgeError
from dpo_loop.progress import say
from judges.backend import JudgeRequest
from judges.batches.play import BatchPlay, Desk, Played, problem_of
from judges.batches.store import BatchStore, ended
from judges.batches.vendor import NEVER_RAN, BatchVendor, Line, Plan, Row, line_id
from judges.budget import Purse
from judges.config import ApiBatch, RemoteModel, VllmRunBatchJudge
from judges.dialect import Answer, Billing, Dialect, unavailable
from judges.direct import num_bytes
from judges.prices import FREE, to_usd
from judges.remote import Call

NOT_TAKEN = -1
"""Status of a row whose batch came to nothing as a whole: it goes into another one."""
MOST_EXPIRIES = 3
LINE_BYTES = 200
"""Of a line beside its body."""
LONGEST_QUEUE_PAUSE_S = 600.0


@dataclass
class _Group:
    """Lines of one batch until they are sent, and who waits for their rows."""

    lines: list[Line] = field(default_factory=list)
    num_bytes: int = 0
    rows: dict[str, asyncio.Future[Row]] = field(default_factory=dict)


class BatchSender:
    """Of one event loop. Raises InputError for a model without a price."""

    in_waves = True

    def __init__(self, config: RemoteModel, dialect: Dialect, vendor: BatchVendor, purse: Purse, store: BatchStore) -> None:
        price = FREE if config.free else purse.price_of(config.model)
        self._batch = _settings_of(config)
        self._desk = Desk(config, self._batch, dialect, vendor, purse, store, price)
        self._next = _Group()
        self._quiet: asyncio.TimerHandle | None = None
        self._open: dict[str, _Group] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._fatal: JudgeError | None = None
        """Nothing more is sent."""
        self._given_up: asyncio.Task[None] | None = None
        self._refused_since: float | None = None
        self._num_refusals = 0

    @property
    def concurrency(self) -> int:
        return self._batch.max_calls

    def pause_s(self, call: Call, answer: Answer) -> float:  # noqa: ARG002 - a batch is pause enough
        return 0.0

    def end(self, call: Call) -> None:
        self._desk.store.forget(call.request.key)

    async def aclose(self) -> None:
        """Batches that are open stay so, for the next process."""
        if self._quiet is not None:
            self._quiet.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._desk.vendor.aclose()

    async def attempt(self, call: Call, *, timeout_s: float) -> Answer:  # noqa: ARG002 - the vendor's window is the deadline
        if self._given_up is None:
            self._given_up = asyncio.create_task(self._give_up())
        await asyncio.shield(self._given_up)
        call.started = call.started or time.monotonic()
        call.attempts += 1
        request, dialect = call.request, self._desk.dialect
        body = dialect.as_sent(dialect.body(request, call.max_output_tokens))
        line = Line(line_id(request.key, call.attempts), request.key, body, call.max_output_tokens)
        num_expired = 0
        while (row := await self._row_of(line)).status in (NEVER_RAN, NOT_TAKEN):
            num_expired += row.status == NEVER_RAN
            if num_expired == MOST_EXPIRIES:
                return Answer(unavailable(f"the vendor did not get to it in {MOST_EXPIRIES} batches"), is_hopeless=True)
        answer = self._answer(row, request)
        call.count(answer.usage, to_usd(self._desk.price.of(answer.usage, at_batch_price=True)))
        return answer

    def _answer(self, row: Row, request: JudgeRequest) -> Answer:
        dialect = self._desk.dialect
        if row.status == 200:
            return dialect.read(row.payload, request)
        words = problem_of(row)
        if dialect.is_about_lengths(row.status, words):
            return Answer(unavailable(words), billing=Billing.NOTHING)
        dialect.has_answered = True  # a row that is kept is about its own call, in whatever process it is read
        return replace(dialect.of_error(row.status, words, {}), is_rate_limit=False)

    # ---------------------------------------------------------------------------------------------------------- gathering

    async def _row_of(self, line: Line) -> Row:
        if self._fatal is not None:
            raise self._fatal
        match self._desk.store.find(line.id):
            case Row() as row:
                return row
            case Plan() as plan:
                group = self._join(plan)
            case None:
                group = self._gather(line)
        return await group.rows.setdefault(line.id, asyncio.get_running_loop().create_future())

    def _gather(self, line: Line) -> _Group:
        size = num_bytes(dict(line.body)) + LINE_BYTES
        if self._next.lines and self._next.num_bytes + size > self._desk.vendor.most_bytes:
            self._send_gathered()
        group = self._next
        group.lines.append(line)
        group.num_bytes += size
        if self._quiet is not None:
            self._quiet.cancel()
        if len(group.lines) >= self._batch.max_calls:
            self._send_gathered()
        else:
            self._quiet = asyncio.get_running_loop().call_later(self._batch.gather_s, self._send_gathered)
        return group

    def _send_gathered(self) -> None:
        group, self._next = self._next, _Group()
        if group.lines:
            self._start(group, None)

    def _join(self, plan: Plan) -> _Group:
        """The batch of a process that is gone, or of this one."""
        if plan.id not in self._open:
            self._open[plan.id] = _Group()
            self._start(self._open[plan.id], plan)
        return self._open[plan.id]

    def _start(self, group: _Group, plan: Plan | None) -> None:
        task = asyncio.create_task(self._run(group, plan))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---------------------------------------------------------------------------------------------------------- handing out

    async def _run(self, group: _Group, plan: Plan | None) -> None:
        """One batch; whoever waits for one of its rows gets it, or hears what went wrong."""
        try:
            plan = plan or self._desk.store.new_plan(group.lines, group.num_bytes)
            self._open[plan.id] = group
            played = await BatchPlay(self._desk, plan, group.lines).play()
            await self._wait_for_queue(played, plan)
        except BaseException as error:
            if isinstance(error, JudgeError) and not error.retryable and self._fatal is None:
                self._fatal = error
                say(f"judge: {error}")
            for row in group.rows.values():
                if not row.done():
                    row.cancel() if isinstance(error, asyncio.CancelledError) else row.set_exception(error)
            if not isinstance(error, Exception):
                raise
        else:
            for line, row in group.rows.items():
                if not row.done():
                    self._hand_out(line, row, played)
        finally:
            if plan is not None:
                self._open.pop(plan.id, None)
                self._desk.purse.leave_batch(plan.id)

    def _hand_out(self, line: str, row: asyncio.Future[Row], played: Played) -> None:
        if line in played.fatal:
            row.set_exception(played.fatal[line])
        elif played.rows is None:
            row.set_result(Row(line, NOT_TAKEN))
        elif line in played.rows:
            row.set_result(played.rows[line])
        else:  # another process may have ended the batch, and kept its rows
            known = self._desk.store.find(line)
            row.set_result(known if isinstance(known, Row) else Row(line, NEVER_RAN))

    async def _wait_for_queue(self, played: Played, plan: Plan) -> None:
        """After a batch that the vendor did not take for now; not for ever, unless batches of ours are what it is full of."""
        if not played.queue_is_full:
            self._refused_since, self._num_refusals = None, 0
            return
        now = time.monotonic()
        self._refused_since = self._refused_since or now
        self._num_refusals += 1
        if now - self._refused_since >= self._batch.queue_s and self._open.keys() <= {plan.id}:
            raise JudgeError(
                f"judge {self._desk.dialect.where} has taken no batch for {self._batch.queue_s:g} s: {played.queue_is_full}. Lower "
                "judge.batch.max_calls if one batch is more than its queue holds, then run the same command again."
            )
        say(f"judge: a batch of {plan.num_lines} calls was not taken ({played.queue_is_full}); they go into another one")
        await asyncio.sleep(min(LONGEST_QUEUE_PAUSE_S, self._batch.poll_s * 2 ** min(10, self._num_refusals - 1)))

    async def _give_up(self) -> None:
        """Batches that the config says are not to be waited for: what they may have cost stays set aside."""
        for plan in self._desk.store.open_plans():
            if any(name and (plan.vendor_id == name or plan.id.startswith(name)) for name in self._batch.give_up):
                num = plan.num_lines
                await self._desk.purse.end_batch(plan.id, spent=0, num_billed=num, num_unknown=num, also=ended(plan, {}))


def _settings_of(config: RemoteModel) -> ApiBatch:
    if isinstance(config, VllmRunBatchJudge):
        return ApiBatch(max_calls=min(50_000, config.max_calls), gather_s=2.0, poll_s=2.0, hand_over_s=0.0, queue_s=0.0)
    return config.batch or ApiBatch()
