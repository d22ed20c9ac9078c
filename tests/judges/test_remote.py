"""Every way in which a provider can fail, over real sockets, for every vendor: what the judge makes of it, and how often it asks."""

from __future__ import annotations

import asyncio
import email.utils
import json
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import InputError, JudgeError
from dpo_loop.types import Decided, Undecided, UndecidedReason
from judges.backend import Backend, JudgeRequest, Reply, open_backend
from judges.backoff import retry_after_s
from judges.budget import Accounts, Purse
from judges.config import RemoteJudge
from judges.ledger import Ledger
from tests.judges.stub import KEY_ENV, Step, Stub, says
from tests.judges.vendors import VENDORS, Vendor
from tests.judges.world import make_prompt

REQUEST = JudgeRequest(key="k" * 64, prompt=make_prompt("Say hello"), left="hello", right="bye")


@pytest.fixture(params=list(VENDORS))
def vendor(request: pytest.FixtureRequest) -> Vendor:
    return VENDORS[request.param]


def verdict(vendor: Vendor, winner: str, rationale: str = "because", *, delay_s: float = 0.0) -> Step:
    step = vendor.text(json.dumps({"rationale": rationale, "winner": winner}))
    step.delay_s = delay_s
    return step


def ask(judge: RemoteJudge, *, times: int = 1) -> list[Reply]:
    async def run(backend: Backend) -> list[Reply]:
        return list(await asyncio.gather(*(backend.ask(REQUEST) for _ in range(times))))

    return asyncio.run(with_backend(judge, run))


async def with_backend(judge: RemoteJudge, use: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        backend = open_backend(judge, await Purse.open(ledger, Accounts(ledger.path)), ledger)
        try:
            return await use(backend)
        finally:
            await backend.aclose()


def reason_of(reply: Reply) -> UndecidedReason:
    assert isinstance(reply.outcome, Undecided), reply
    return reply.outcome.reason


@pytest.mark.parametrize(("winner", "p_left"), [("A", 1.0), ("B", 0.0), ("tie", 0.5)])
def test_a_verdict_becomes_a_probability_with_usage_and_the_model_that_served_it(
    stub: Stub, vendor: Vendor, winner: str, p_left: float
) -> None:
    """A thinking block or a reasoning item stands before the verdict where the vendor has one; it never counts."""
    stub.script = [verdict(vendor, winner, "shorter")]
    [reply] = ask(vendor.judge(stub))
    assert reply.outcome == Decided(p_left=p_left, rationale="shorter")
    usage = reply.usage
    assert (usage.input_tokens, usage.cached_input_tokens, usage.output_tokens) == (100, 40, 7)
    assert (reply.served_model, reply.request_id, reply.attempts) == ("judge-2026-11-01", "chatcmpl-7", 1)
    [seen] = stub.seen
    assert seen.authorization == "Bearer sk-test-0123456789"
    assert seen.key == REQUEST.key


def test_each_vendor_is_asked_through_its_own_api(stub: Stub) -> None:
    for vendor in VENDORS.values():
        stub.script = [verdict(vendor, "A")]
        ask(vendor.judge(stub))
    chat, responses, messages = stub.seen
    assert [seen.path for seen in stub.seen] == ["/v1/chat/completions", "/v1/responses", "/v1/messages"]
    assert chat.body["response_format"]["json_schema"]["strict"] is True
    assert (responses.body["store"], responses.body["text"]["format"]["strict"]) == (False, True)
    assert messages.body["output_config"]["format"]["schema"]["required"] == ["rationale", "winner"]
    for body in (chat.body, responses.body, messages.body):
        assert not {"temperature", "top_p", "seed"} & set(body)


def test_a_set_temperature_is_sent(stub: Stub) -> None:
    ask(stub.judge(temperature=0.0))
    assert stub.seen[0].body["temperature"] == 0.0


def test_without_a_rationale_the_verdict_stands_alone(stub: Stub, vendor: Vendor) -> None:
    stub.script = [vendor.text('{"winner": "B"}')]
    [reply] = ask(vendor.judge(stub, rationale=False))
    assert reply.outcome == Decided(p_left=0.0)
    assert '"rationale"' not in json.dumps(stub.seen[0].body)


def test_the_environment_of_the_sdk_cannot_redirect_a_judge(stub: Stub, vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI", "ANTHROPIC"):
        monkeypatch.setenv(f"{name}_BASE_URL", "http://127.0.0.1:9/v1")
        monkeypatch.setenv(f"{name}_API_KEY", "another key")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "another token")
    stub.policy = lambda body: verdict(vendor, "A")
    ask(vendor.judge(stub))
    assert stub.seen[0].authorization == "Bearer sk-test-0123456789"


def test_a_missing_key_is_named_before_anything_is_asked(stub: Stub, vendor: Vendor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_ENV)
    with pytest.raises(InputError, match=KEY_ENV):
        ask(vendor.judge(stub))
    assert not stub.seen


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
    [reply] = ask(vendor.judge(stub, deadline_s=5.0))
    assert time.monotonic() - started < 3
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


FATAL = {
    401: ("Incorrect API key provided: sk-test-0123456789", "invalid_api_key", "Incorrect API key provided"),
    403: ("this project may not use judge", "permission_error", "may not use judge"),
    402: ("pay first", "billing_error", "pay first"),
    404: ("The model `judge` does not exist", "model_not_found", "does not exist"),
    429: ("You have reached your limit", "insufficient_quota", "reached your limit.*insufficient_quota"),
    400: ("the schema is not supported", "unsupported_parameter", "the schema is not supported"),
}


@pytest.mark.parametrize("status", list(FATAL))
def test_what_no_retry_can_mend_ends_the_stage_with_the_providers_words(stub: Stub, vendor: Vendor, status: int) -> None:
    message, code, words = FATAL[status]
    stub.policy = lambda body: vendor.error(status, message, code)
    with pytest.raises(JudgeError, match=words) as caught:
        ask(vendor.judge(stub))
    assert len(stub.seen) == 1
    assert not caught.value.retryable
    assert "sk-test" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    "words", ["enforced_spend_limit_reached", "contract_spend_limit_reached", "Your credit balance is too low"]
)
def test_a_spend_limit_of_anthropic_is_no_rate_limit(stub: Stub, words: str) -> None:
    error = {"type": "rate_limit_error", "message": "no more today", "error_code": words, "details": {"error_code": words}}
    step = Step(429, json.dumps({"type": "error", "error": error}).encode())
    stub.policy = lambda body: step
    with pytest.raises(JudgeError, match="quota is used up"):
        ask(VENDORS["anthropic"].judge(stub))
    assert len(stub.seen) == 1


UNREADABLE = {
    "html": b"<html>captive portal</html>",
    "bad json": b'{"choices": [',
    "bad bytes": b"\xff\xfe{",
    "wrong shape": b'{"ok": true}',
    "empty": b"",
    "no choices": b'{"choices": [], "output": [], "status": "completed", "content": []}',
    "list": b"[1, 2]",
    "null": b"null",
    "no message": b'{"choices": [{"message": null}], "output": [{"type": "message"}], "status": "completed", "content": [{"type": "text"}]}',
    "wrong types": b'{"choices": 3, "output": "x", "status": 1, "content": 7, "usage": "none"}',
}
NO_VERDICT = {
    "no content": None,
    "prose": "The winner is [[A]]",
    "no rationale": '{"winner": "A"}',
    "unknown winner": '{"rationale": "x", "winner": "C"}',
    "two verdicts": '{"rationale": "x", "winner": "A"} {"rationale": "x", "winner": "B"}',
}


@pytest.mark.parametrize("case", [*UNREADABLE, *NO_VERDICT])
def test_a_200_that_is_no_verdict_is_asked_once_more_and_then_undecided(stub: Stub, vendor: Vendor, case: str) -> None:
    kind = "text/html" if case == "html" else "application/json"
    step = Step(200, UNREADABLE[case], {"content-type": kind}) if case in UNREADABLE else vendor.text(NO_VERDICT[case])
    stub.policy = lambda body: step
    [reply] = ask(vendor.judge(stub))
    assert reason_of(reply) is UndecidedReason.MALFORMED
    assert not reply.is_final
    assert len(stub.seen) == 2

    stub.script = [step, verdict(vendor, "A")]
    [reply] = ask(vendor.judge(stub))
    assert isinstance(reply.outcome, Decided)


def test_a_truncated_verdict_gets_twice_the_room_once_and_all_usage_is_kept(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: vendor.cut('{"rationale": "and so on')
    [reply] = ask(vendor.judge(stub, max_output_tokens=50))
    assert reason_of(reply) is UndecidedReason.TRUNCATED
    assert [seen.body[vendor.room] for seen in stub.seen] == [50, 100]
    assert (reply.usage.input_tokens, reply.usage.output_tokens) == (200, 14)
    assert not reply.is_final


@pytest.mark.parametrize("text", ["", "I cannot help", '{"rationale": "x", "winner": "A"}'])
def test_a_refusal_is_final_and_never_a_label(stub: Stub, vendor: Vendor, text: str) -> None:
    stub.policy = lambda body: vendor.refusal("I cannot help with that", text)
    [reply] = ask(vendor.judge(stub))
    assert reason_of(reply) is UndecidedReason.REFUSED
    assert "I cannot help with that" in reply.outcome.detail
    assert reply.is_final
    assert len(stub.seen) == 1


def test_a_content_filter_is_a_refusal(stub: Stub, vendor: Vendor) -> None:
    stub.policy = lambda body: vendor.error(400, "The response was filtered", code="content_filter")
    [reply] = ask(vendor.judge(stub))
    assert reason_of(reply) is UndecidedReason.REFUSED
    assert len(stub.seen) == 1


@pytest.mark.parametrize(
    ("status", "words", "reason"),
    [
        (400, "This model's maximum context length is 8192 tokens", UndecidedReason.TRUNCATED),
        (400, "prompt is too long: 300000 tokens > 200000 maximum", UndecidedReason.TRUNCATED),
        (413, "too large", UndecidedReason.TRUNCATED),
        (422, "cannot process", UndecidedReason.MALFORMED),
    ],
)
def test_one_comparison_that_does_not_fit_leaves_the_others_alone(
    stub: Stub, vendor: Vendor, status: int, words: str, reason: UndecidedReason
) -> None:
    stub.script = [vendor.error(status, words)] * (2 if reason is UndecidedReason.MALFORMED else 1)
    stub.policy = lambda body: verdict(vendor, "A")
    [first] = ask(vendor.judge(stub))
    [second] = ask(vendor.judge(stub))
    assert reason_of(first) is reason
    assert isinstance(second.outcome, Decided)


def test_one_request_that_the_server_refuses_after_it_answered_others_is_undecided(stub: Stub, vendor: Vendor) -> None:
    """OpenAI refuses single prompts with 400 invalid_prompt: safety prompts are daily traffic, and must not end a run."""
    refusals = [("Invalid prompt: potentially violating our usage policy", "invalid_prompt"), ("cannot read this", "bad_request")]
    stub.script = [verdict(vendor, "A"), *(vendor.error(400, *refusal) for refusal in refusals), verdict(vendor, "B")]

    async def run(backend: Backend) -> list[Reply]:
        return [await backend.ask(REQUEST) for _ in range(4)]

    first, policy, other, last = asyncio.run(with_backend(vendor.judge(stub), run))
    assert (first.outcome.kind, last.outcome.kind) == ("decided", "decided")
    assert (reason_of(policy), reason_of(other)) == (UndecidedReason.REFUSED, UndecidedReason.MALFORMED)
    assert len(stub.seen) == 4, "what is refused for good is not asked again"


def test_a_model_without_more_room_leaves_a_truncated_verdict_truncated(stub: Stub, vendor: Vendor) -> None:
    stub.script = [
        vendor.cut('{"rationale": "'),
        vendor.error(400, f"{vendor.room} is too large: this model supports at most 1500"),
    ]
    [reply] = ask(vendor.judge(stub))
    assert reason_of(reply) is UndecidedReason.TRUNCATED
    assert (reply.attempts, reply.usage.output_tokens) == (2, 7)


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


@pytest.mark.parametrize(("name", "where"), [("openai", "reasoning"), ("anthropic", "output_config")])
def test_effort_is_sent_where_it_is_set_and_is_another_question(stub: Stub, name: str, where: str) -> None:
    vendor = VENDORS[name]
    stub.policy = lambda body: verdict(vendor, "A")
    ask(vendor.judge(stub, effort="low"))
    ask(vendor.judge(stub))
    assert stub.seen[0].body[where]["effort"] == "low"
    assert "effort" not in stub.seen[1].body.get(where, {})

    async def identity(backend: Backend) -> Any:
        return backend.spec.identity

    judges = [vendor.judge(stub, effort="low"), vendor.judge(stub)]
    assert len({json.dumps(asyncio.run(with_backend(judge, identity))) for judge in judges}) == 2


@pytest.mark.parametrize("name", ["openai_compatible", "openai"])
def test_a_server_that_refuses_length_limits_in_a_schema_is_asked_without_them(stub: Stub, name: str) -> None:
    vendor = VENDORS[name]

    def policy(body: dict[str, Any]) -> Step:
        limited = "maxLength" in json.dumps(body)
        return vendor.error(400, "Invalid schema: 'maxLength' is not permitted") if limited else verdict(vendor, "A")

    stub.policy = policy
    replies = ask(vendor.judge(stub), times=3)
    assert all(isinstance(reply.outcome, Decided) for reply in replies)
    stub.policy = lambda body: vendor.error(400, "'maxLength' is not permitted")
    with pytest.raises(JudgeError, match="is not permitted"):
        ask(vendor.judge(stub))


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
