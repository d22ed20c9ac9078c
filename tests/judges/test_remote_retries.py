"""When a remote judge is asked again, how long it waits, and when it stops; over real sockets, for every vendor."""

from __future__ import annotations

import asyncio
import email.utils
import time

import pytest

from dpo_loop.types import Decided, Undecided, UndecidedReason
from judges.backend import Backend
from judges.backoff import retry_after_s
from tests.judges.asking import REQUEST, ask, reason_of, verdict, with_backend
from tests.judges.stub import Step, Stub, says
from tests.judges.vendors import Vendor


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529, None])
def test_a_passing_failure_is_asked_again(stub: Stub, vendor: Vendor, status: int | None) -> None:
    failure = Step(drop=True) if status is None else vendor.error(status, "try again")
    stub.script = [failure, verdict(vendor, "B")]
    [reply] = ask(vendor.judge(stub))
    assert reply.outcome == Decided(p_left=0.0, rationale="because")
    assert reply.attempts == len(stub.seen) == 2


def test_attempts_are_capped_and_the_outage_is_no_label(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: vendor.error(500, "the lights are out")
    [reply] = ask(vendor.judge(stub, max_attempts=2))
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "the lights are out" in reply.outcome.detail
    assert not reply.is_final
    assert len(stub.seen) == 2


@pytest.mark.parametrize(
    "headers", [{"retry_after": "1"}, {"retry_after_ms": "1000"}, {"retry_after": "1", "retry_after_ms": "900"}]
)
def test_a_rate_limit_is_waited_out_as_long_as_the_server_asks(stub: Stub, vendor: Vendor, headers: dict[str, str]) -> None:
    stub.script = [vendor.error(429, "slow down", code="rate_limit_exceeded", **headers), verdict(vendor, "A")]
    [reply] = ask(vendor.judge(stub))
    assert isinstance(reply.outcome, Decided)
    assert stub.seen[1].at - stub.seen[0].at >= 0.9


def test_a_date_to_come_back_at_is_waited_for(stub: Stub, vendor: Vendor) -> None:
    date = email.utils.formatdate(time.time() + 2, usegmt=True)  # whole seconds: it may lie a second nearer
    stub.script = [vendor.error(429, "slow down", retry_after=date), verdict(vendor, "A")]
    [reply] = ask(vendor.judge(stub))
    assert isinstance(reply.outcome, Decided)
    assert stub.seen[1].at - stub.seen[0].at >= 0.9


def test_a_wait_that_is_asked_for_is_capped(stub: Stub, vendor: Vendor) -> None:
    stub.script = [vendor.error(429, "slow down", retry_after="600")]
    [reply] = ask(vendor.judge(stub, deadline_s=30))
    assert isinstance(reply.outcome, Undecided)
    assert "would have to wait 60.0 s" in reply.outcome.detail


def test_a_server_that_asks_one_call_to_wait_is_left_alone_by_all(stub: Stub, vendor: Vendor) -> None:
    stub.script = [vendor.error(429, "slow down", retry_after="1")]
    stub.policy = lambda body: verdict(vendor, "A")

    async def use(backend: Backend) -> None:
        first = asyncio.create_task(backend.ask(REQUEST))
        while not stub.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await backend.ask(REQUEST)
        await first

    asyncio.run(with_backend(vendor.judge(stub), use))
    assert all(later.at - stub.seen[0].at >= 0.9 for later in stub.seen[1:])
    assert len(stub.seen) == 3


def test_a_wait_past_the_deadline_is_not_begun(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: vendor.error(429, "come back later", retry_after="600")
    started = time.monotonic()
    [reply] = ask(vendor.judge(stub, deadline_s=20.0))
    assert time.monotonic() - started < 10
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "come back later" in reply.outcome.detail
    assert len(stub.seen) == 1


def test_the_deadline_bounds_all_attempts_together(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: verdict(vendor, "A", delay_s=30)
    started = time.monotonic()
    [reply] = ask(vendor.judge(stub, attempt_timeout_s=0.4, deadline_s=1.0, max_attempts=100))
    assert 0.4 <= time.monotonic() - started < 3
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert len(stub.seen) <= 4


def test_the_deadline_cuts_an_attempt_that_may_take_longer(stub: Stub, vendor: Vendor) -> None:
    stub.script = [vendor.error(500, "boom"), verdict(vendor, "A", delay_s=30)]
    started = time.monotonic()
    [reply] = ask(vendor.judge(stub, attempt_timeout_s=60.0, deadline_s=4.0))
    assert time.monotonic() - started < 10
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "deadline_s = 4; before that: HTTP 500: boom" in reply.outcome.detail


def test_a_hang_is_cut_at_the_attempt_time_out_and_asked_again(stub: Stub, vendor: Vendor) -> None:
    stub.script = [verdict(vendor, "A", delay_s=30), verdict(vendor, "B")]
    [reply] = ask(vendor.judge(stub, attempt_timeout_s=0.5))
    assert reply.outcome == Decided(p_left=0.0, rationale="because")


def test_a_reply_that_is_cut_off_in_its_body_is_asked_again(stub: Stub, vendor: Vendor) -> None:
    stub.script = [Step(body=b'{"id": "x', cut_short=True)]
    stub.policy = lambda body: verdict(vendor, "A")
    [reply] = ask(vendor.judge(stub))
    assert isinstance(reply.outcome, Decided)
    assert len(stub.seen) == 2


def test_the_wait_in_line_is_no_latency(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: verdict(vendor, "A", delay_s=0.1)
    replies = ask(vendor.judge(stub, concurrency=1, start_concurrency=1), times=6)
    assert max(reply.latency_s for reply in replies) < 0.5


def test_no_more_calls_are_under_way_than_allowed(stub: Stub) -> None:
    stub.policy = lambda body: says("A", delay_s=0.05)
    assert len(ask(stub.judge(concurrency=3), times=12)) == 12
    assert stub.most_at_once == 3


def test_retry_after_is_read_in_every_form() -> None:
    now = 1_700_000_000.0
    in_90_s = email.utils.formatdate(now + 90, usegmt=True)
    assert retry_after_s({"retry-after": "7"}, now=now) == 7
    assert retry_after_s({"retry-after": "0.5"}, now=now) == 0.5
    assert retry_after_s({"retry-after": in_90_s}, now=now) == 90
    assert retry_after_s({"retry-after": "-3"}, now=now) == 0
    assert retry_after_s({"retry-after": "soon"}, now=now) is None
    assert retry_after_s({"retry-after": "nan"}, now=now) is None
    assert retry_after_s({}, now=now) is None
