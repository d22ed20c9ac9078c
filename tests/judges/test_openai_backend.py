"""Every way in which a provider can fail, over real sockets: what the judge makes of it, and how often it asks."""

from __future__ import annotations

import asyncio
import email.utils
import json
import pickle
import time
from typing import Any

import pytest

from dpo_loop.errors import InputError, JudgeError
from dpo_loop.types import Decided, Undecided, UndecidedReason
from judges.backend import JudgeRequest, Reply
from judges.backoff import retry_after_s
from judges.config import OpenAIJudge
from judges.openai_backend import OpenAIBackend
from tests.judges.stub import KEY_ENV, Step, Stub, chat, fails, says
from tests.judges.world import make_prompt

REQUEST = JudgeRequest(key="k" * 64, prompt=make_prompt("Say hello"), left="hello", right="bye")


def ask(judge: OpenAIJudge, *, times: int = 1) -> list[Reply]:
    async def run() -> list[Reply]:
        backend = OpenAIBackend(judge)
        try:
            return list(await asyncio.gather(*(backend.ask(REQUEST) for _ in range(times))))
        finally:
            await backend.aclose()

    return asyncio.run(run())


def reason_of(reply: Reply) -> UndecidedReason:
    assert isinstance(reply.outcome, Undecided), reply
    return reply.outcome.reason


@pytest.mark.parametrize(("winner", "p_left"), [("A", 1.0), ("B", 0.0), ("tie", 0.5)])
def test_a_verdict_becomes_a_probability_with_usage_and_the_model_that_served_it(stub: Stub, winner: str, p_left: float) -> None:
    stub.script = [says(winner, rationale="shorter")]
    [reply] = ask(stub.judge())
    assert reply.outcome == Decided(p_left=p_left, rationale="shorter")
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (100, 7)
    assert (reply.served_model, reply.request_id, reply.attempts) == ("judge-2026-11-01", "chatcmpl-7", 1)
    [seen] = stub.seen
    assert seen.authorization == "Bearer sk-test-0123456789"
    assert seen.key == REQUEST.key
    assert seen.body["response_format"]["json_schema"]["strict"] is True
    assert "temperature" not in seen.body


def test_a_set_temperature_is_sent(stub: Stub) -> None:
    ask(stub.judge(temperature=0.0))
    assert stub.seen[0].body["temperature"] == 0.0


def test_the_environment_of_the_sdk_cannot_redirect_a_judge(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    monkeypatch.setenv("OPENAI_API_KEY", "another key")
    ask(stub.judge())
    assert stub.seen[0].authorization == "Bearer sk-test-0123456789"


def test_a_missing_key_is_named_before_anything_is_asked(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV)
    with pytest.raises(InputError, match=KEY_ENV):
        OpenAIBackend(stub.judge())


@pytest.mark.parametrize(
    "failure",
    [fails(500, "boom"), fails(503, "busy"), fails(408, "slow"), fails(409, "conflict"), fails(429, "slow down"), Step(drop=True)],
    ids=["500", "503", "408", "409", "429", "dropped"],
)
def test_a_passing_failure_is_asked_again(stub: Stub, failure: Step) -> None:
    stub.script = [failure, says("B")]
    [reply] = ask(stub.judge())
    assert reply.outcome == Decided(p_left=0.0, rationale="because")
    assert reply.attempts == len(stub.seen) == 2


def test_attempts_are_capped_and_the_outage_is_no_label(stub: Stub) -> None:
    stub.policy = lambda body: fails(500, "the lights are out")
    [reply] = ask(stub.judge(max_attempts=2))
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "the lights are out" in reply.outcome.detail
    assert not reply.is_final
    assert len(stub.seen) == 2


@pytest.mark.parametrize(
    "headers", [{"retry_after": "1"}, {"retry_after_ms": "1000"}, {"retry_after": "1", "retry_after_ms": "900"}]
)
def test_a_rate_limit_is_waited_out_as_long_as_the_server_asks(stub: Stub, headers: dict[str, str]) -> None:
    stub.script = [fails(429, "slow down", code="rate_limit_exceeded", **headers)]
    [reply] = ask(stub.judge())
    assert isinstance(reply.outcome, Decided)
    assert stub.seen[1].at - stub.seen[0].at >= 0.9


def test_a_server_that_asks_one_call_to_wait_is_left_alone_by_all(stub: Stub) -> None:
    stub.script = [fails(429, "slow down", retry_after="1")]

    async def run() -> None:
        backend = OpenAIBackend(stub.judge())
        first = asyncio.create_task(backend.ask(REQUEST))
        while not stub.seen:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        await backend.ask(REQUEST)
        await first
        await backend.aclose()

    asyncio.run(run())
    assert all(later.at - stub.seen[0].at >= 0.9 for later in stub.seen[1:])
    assert len(stub.seen) == 3


def test_a_wait_past_the_deadline_is_not_begun(stub: Stub) -> None:
    stub.policy = lambda body: fails(429, "come back later", retry_after="600")
    started = time.monotonic()
    [reply] = ask(stub.judge(deadline_s=5.0))
    assert time.monotonic() - started < 3
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "come back later" in reply.outcome.detail
    assert len(stub.seen) == 1


def test_the_deadline_bounds_all_attempts_together(stub: Stub) -> None:
    stub.policy = lambda body: says("A", delay_s=30)
    started = time.monotonic()
    [reply] = ask(stub.judge(attempt_timeout_s=0.4, deadline_s=1.0, max_attempts=100))
    assert 0.4 <= time.monotonic() - started < 3
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert len(stub.seen) <= 4


def test_the_deadline_cuts_an_attempt_that_may_take_longer(stub: Stub) -> None:
    stub.script = [fails(500, "boom"), says("A", delay_s=30)]
    started = time.monotonic()
    [reply] = ask(stub.judge(attempt_timeout_s=60.0, deadline_s=4.0))
    assert time.monotonic() - started < 10
    assert reason_of(reply) is UndecidedReason.UNAVAILABLE
    assert "deadline_s = 4; before that: HTTP 500: boom" in reply.outcome.detail


def test_a_hang_is_cut_at_the_attempt_time_out_and_asked_again(stub: Stub) -> None:
    stub.script = [says("A", delay_s=30), says("B")]
    [reply] = ask(stub.judge(attempt_timeout_s=0.5))
    assert reply.outcome == Decided(p_left=0.0, rationale="because")


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (fails(401, "Incorrect API key provided: sk-test-0123456789", code="invalid_api_key"), "Incorrect API key provided"),
        (fails(403, "this project may not use judge"), "may not use judge"),
        (fails(402, "pay first"), "pay first"),
        (fails(404, "The model `judge` does not exist", code="model_not_found"), "does not exist"),
        (fails(429, "You exceeded your current quota", code="insufficient_quota"), "exceeded your current quota"),
        (fails(400, "response_format is not supported", code="unsupported_parameter"), "response_format is not supported"),
    ],
    ids=["401", "403", "402", "404", "quota", "400"],
)
def test_what_no_retry_can_mend_ends_the_stage_with_the_providers_words(stub: Stub, failure: Step, words: str) -> None:
    stub.policy = lambda body: failure
    with pytest.raises(JudgeError, match=words) as caught:
        ask(stub.judge())
    assert len(stub.seen) == 1
    assert not caught.value.retryable
    assert "sk-test" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "unreadable",
    [
        Step(200, b"<html>captive portal</html>", {"content-type": "text/html"}),
        Step(200, b'{"choices": [', {"content-type": "application/json"}),
        Step(200, b"\xff\xfe{", {"content-type": "application/json"}),
        Step(200, b'{"ok": true}', {"content-type": "application/json"}),
        Step(200, b'{"choices": []}', {"content-type": "application/json"}),
        Step(200, b"[1, 2]", {"content-type": "application/json"}),
        Step(200, b"null", {"content-type": "application/json"}),
        Step(200, b'{"choices": [{"message": null}]}', {"content-type": "application/json"}),
        Step(200, b'{"choices": 3, "usage": "none"}', {"content-type": "application/json"}),
        chat(None),
        chat("The winner is [[A]]"),
        chat(json.dumps({"winner": "A"})),
        chat(json.dumps({"rationale": "x", "winner": "C"})),
        chat('{"rationale": "x", "winner": "A"} {"rationale": "x", "winner": "B"}'),
    ],
    ids=[
        "html", "bad json", "bad bytes", "wrong shape", "no choices", "list", "null", "no message", "wrong types", "no content",
        "prose", "no rationale", "unknown winner", "two verdicts",
    ],
)  # fmt: skip
def test_a_200_that_is_no_verdict_is_asked_once_more_and_then_undecided(stub: Stub, unreadable: Step) -> None:
    stub.policy = lambda body: unreadable
    [reply] = ask(stub.judge())
    assert reason_of(reply) is UndecidedReason.MALFORMED
    assert not reply.is_final
    assert len(stub.seen) == 2

    stub.script = [unreadable, says("A")]
    [reply] = ask(stub.judge())
    assert isinstance(reply.outcome, Decided)


def test_a_truncated_verdict_gets_twice_the_room_once_and_all_usage_is_kept(stub: Stub) -> None:
    stub.policy = lambda body: chat('{"rationale": "and so on', finish="length")
    [reply] = ask(stub.judge(max_output_tokens=50))
    assert reason_of(reply) is UndecidedReason.TRUNCATED
    assert [seen.body["max_completion_tokens"] for seen in stub.seen] == [50, 100]
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (200, 14)
    assert not reply.is_final


@pytest.mark.parametrize(
    "refusal",
    [
        chat(None, refusal="I cannot help with that"),
        chat("", finish="content_filter"),
        chat("I cannot help", finish="stop", refusal="policy"),
        fails(400, "The response was filtered", code="content_filter"),
    ],
    ids=["refusal", "filter", "refusal with text", "filtered request"],
)
def test_a_refusal_is_final_and_never_a_label(stub: Stub, refusal: Step) -> None:
    stub.policy = lambda body: refusal
    [reply] = ask(stub.judge())
    assert reason_of(reply) is UndecidedReason.REFUSED
    assert reply.is_final
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (
            fails(400, "This model's maximum context length is 8192 tokens", code="context_length_exceeded"),
            UndecidedReason.TRUNCATED,
        ),
        (fails(413, "too large"), UndecidedReason.TRUNCATED),
        (fails(422, "cannot process"), UndecidedReason.MALFORMED),
    ],
    ids=["context", "413", "422"],
)
def test_one_comparison_that_does_not_fit_leaves_the_others_alone(stub: Stub, failure: Step, reason: UndecidedReason) -> None:
    stub.script = [failure, failure, says("A")] if reason is UndecidedReason.MALFORMED else [failure, says("A")]
    [first] = ask(stub.judge())
    [second] = ask(stub.judge())
    assert reason_of(first) is reason
    assert isinstance(second.outcome, Decided)


def test_a_server_that_refuses_length_limits_in_a_schema_is_asked_without_them(stub: Stub) -> None:
    def policy(body: dict[str, Any]) -> Step:
        limited = "maxLength" in json.dumps(body["response_format"])
        return fails(400, "Invalid schema for response_format 'verdict': 'maxLength' is not permitted") if limited else says("A")

    stub.policy = policy
    replies = ask(stub.judge(), times=3)
    assert all(isinstance(reply.outcome, Decided) for reply in replies)
    stub.policy = lambda body: fails(400, "'maxLength' is not permitted")
    with pytest.raises(JudgeError, match="is not permitted"):
        ask(stub.judge())


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
