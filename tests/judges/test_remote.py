"""What is sent to each vendor, and with which credentials."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from dpo_loop.errors import InputError, JudgeError
from dpo_loop.types import Decided
from judges.backend import Backend
from tests.judges.asking import REQUEST, ask, verdict, with_backend
from tests.judges.stub import KEY_ENV, Step, Stub
from tests.judges.vendors import VENDORS, Vendor


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
