"""Judge of kind `anthropic`: Messages with structured output, at Anthropic or at vLLM's `/v1/messages`.

No sampling parameter is sent: newer models refuse them. A refusal is a reply of status 200, its text may be empty, and a thinking
block may stand before the verdict. Lengths in a schema are not enforced there, so none is sent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anthropic
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_loop.types import Undecided, UndecidedReason, Usage
from judges.backend import JudgeRequest
from judges.ballot import parse_reply
from judges.config import AnthropicJudge
from judges.dialect import NO_USAGE, Answer, Billing, Dialect, StatedUsage, malformed, usage_of, without_lengths
from judges.rubric import load_rubric, render, reply_in_json, schema_of

_TRUNCATED = {"max_tokens", "model_context_window_exceeded"}
_WHOLE = {"end_turn", "stop_sequence"}


class _Lax(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Block(_Lax):
    type: str
    text: str | None = None


class _Usage(StatedUsage):
    input_tokens: int
    output_tokens: int
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    @property
    def ours(self) -> Usage:
        """Anthropic counts tokens read from its cache and written to it apart from the others."""
        cached = self.cache_read_input_tokens or 0
        total = self.input_tokens + (self.cache_creation_input_tokens or 0) + cached
        return Usage(input_tokens=total, cached_input_tokens=cached, output_tokens=self.output_tokens)


class _Stop(_Lax):
    category: str | None = None
    explanation: str | None = None


class _Message(_Lax):
    id: str | None = None
    model: str | None = None
    content: list[_Block]
    stop_reason: str | None = None
    stop_details: _Stop | None = None
    usage: Any = None


class MessagesDialect(Dialect):
    path = "/v1/messages"
    config: AnthropicJudge

    def __init__(self, config: AnthropicJudge) -> None:
        super().__init__(config, anthropic)
        self._rubric = load_rubric(config.rubric)

    def connect(self, http: Any) -> anthropic.AsyncAnthropic:
        # `ANTHROPIC_AUTH_TOKEN` and profile files are looked at only where no key is given.
        return anthropic.AsyncAnthropic(
            api_key=self.key, base_url=self.config.base_url, max_retries=0, timeout=self.config.attempt_timeout_s, http_client=http
        )

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"rationale": self.config.rationale, "effort": self.config.effort, **self._rubric.identity}

    def body(self, request: JudgeRequest, max_output_tokens: int) -> dict[str, Any]:
        system, user = render(self._rubric, request, reply_in_json(request, rationale=self.config.rationale))
        schema = without_lengths(schema_of(request, rationale=self.config.rationale))
        thought = {"effort": self.config.effort} if self.config.effort else {}
        return {
            "model": self.config.model,
            "max_tokens": max_output_tokens,
            "system": system["content"],
            "messages": [user],
            "output_config": {"format": {"type": "json_schema", "schema": schema}, **thought},
        }

    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        create = self.client.messages.with_raw_response.create
        # As it is: the SDK walks every other parameter through its types, which costs more than the rest of a call.
        return await create(
            model=self.config.model, max_tokens=body["max_tokens"], messages=[], extra_body=body, extra_headers=headers
        )

    def read(self, payload: bytes, request: JudgeRequest) -> Answer:
        try:
            message = _Message.model_validate_json(payload)
        except ValidationError as error:
            return self.no_reply(payload, "a message", error.errors()[0]["msg"])
        text = "".join(block.text or "" for block in message.content if block.type == "text")
        outcome: Any
        if message.stop_reason == "refusal":
            stop = message.stop_details or _Stop()
            words = f"{stop.category or 'refused'} {stop.explanation or ''}"
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail=self.clean(words))
        elif message.stop_reason in _TRUNCATED:
            outcome = Undecided(reason=UndecidedReason.TRUNCATED, detail=f"cut off: {message.stop_reason}")
        elif message.stop_reason in _WHOLE:
            outcome = parse_reply(text, request, rationale=self.config.rationale)
        else:
            outcome = malformed(f"the reply stopped with {message.stop_reason}")
        usage = usage_of(_Usage, message.usage)
        return Answer(
            outcome,
            raw=text,
            usage=usage or NO_USAGE,
            served_model=message.model or "",
            request_id=message.id or "",
            billing=Billing.SETTLED if usage else Billing.UNKNOWN,
            is_hopeless=message.stop_reason == "model_context_window_exceeded",
        )
