"""What becomes of each reply and each refusal of a remote judge; over real sockets, for every vendor."""

from __future__ import annotations

import asyncio
import json
import pickle

import pytest

from dpo_loop.errors import JudgeError
from dpo_loop.types import Decided, UndecidedReason
from judges.backend import Backend, Reply
from tests.judges.asking import REQUEST, ask, reason_of, verdict, with_backend
from tests.judges.stub import Step, Stub
from tests.judges.vendors import VENDORS, Vendor

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
