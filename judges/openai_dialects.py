"""OpenAI's two APIs: Responses for OpenAI itself, chat completions for vLLM and every server that is compatible.

With a reasoning parser, vLLM's `/v1/responses` does not hold a reply to its schema while chat completions does (vllm#44012), so
compatible servers are never asked through Responses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_loop.types import Undecided, UndecidedReason, Usage
from judges.backend import JudgeRequest
from judges.ballot import parse_reply
from judges.config import OpenAICompatibleJudge, OpenAIJudge, RemoteModel, VllmLabelJudge
from judges.dialect import NO_USAGE, Answer, Billing, Dialect, StatedUsage, malformed, unavailable, usage_of
from judges.rubric import load_rubric, render, reply_in_json, schema_of


class Lax(BaseModel):
    """What is read of a reply. The SDK hands a 200 through whatever it holds (HTML as a `str`, another shape as a record full of
    None, broken JSON as a bare ValueError), so the body is validated here, once, against the few fields that count."""

    model_config = ConfigDict(extra="ignore")


class _Cached(Lax):
    cached_tokens: int | None = None


class ChatUsage(StatedUsage):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Cached | None = None

    @property
    def ours(self) -> Usage:
        cached = (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0
        return Usage(input_tokens=self.prompt_tokens, cached_input_tokens=cached, output_tokens=self.completion_tokens)


class _Message(Lax):
    content: str | None = None
    refusal: str | None = None


class _LogProb(Lax):
    token: str
    logprob: float


class _Position(Lax):
    top_logprobs: list[_LogProb] = []


class _LogProbs(Lax):
    content: list[_Position] | None = None


class Choice(Lax):
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None


class Completion(Lax):
    id: str | None = None
    model: str | None = None
    choices: list[Choice]
    usage: Any = None

    @property
    def choice(self) -> Choice:
        return self.choices[0] if self.choices else Choice()


class _Part(Lax):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class _Item(Lax):
    type: str = ""
    content: list[_Part] | None = None


class _ResponsesUsage(StatedUsage):
    input_tokens: int
    output_tokens: int
    input_tokens_details: _Cached | None = None

    @property
    def ours(self) -> Usage:
        cached = (self.input_tokens_details and self.input_tokens_details.cached_tokens) or 0
        return Usage(input_tokens=self.input_tokens, cached_input_tokens=cached, output_tokens=self.output_tokens)


class _Reason(Lax):
    reason: str | None = None


class _Error(Lax):
    code: str | None = None
    message: str | None = None


class _Response(Lax):
    id: str | None = None
    model: str | None = None
    status: str
    output: list[_Item]
    usage: Any = None
    incomplete_details: _Reason | None = None
    error: _Error | None = None


class OpenAIDialect(Dialect):
    """The body goes through `extra_body`, as it is: the SDK walks every other parameter through its types, which costs more than the rest of a call."""

    path = "/v1/chat/completions"

    def __init__(self, config: RemoteModel) -> None:
        super().__init__(config, openai)

    def connect(self, http: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=self.key,
            base_url=self.config.base_url,
            max_retries=0,
            timeout=self.config.attempt_timeout_s,
            organization="",
            project="",
            http_client=http,
        )


class RubricDialect(OpenAIDialect):
    """Of a judge that is shown a rubric."""

    config: OpenAIJudge | OpenAICompatibleJudge | VllmLabelJudge

    def __init__(self, config: OpenAIJudge | OpenAICompatibleJudge | VllmLabelJudge) -> None:
        super().__init__(config)
        self._rubric = load_rubric(config.rubric)

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"rationale": self.config.rationale, **self._rubric.identity}


class ResponsesDialect(RubricDialect):
    """Judge of kind `openai`."""

    path = "/v1/responses"
    config: OpenAIJudge

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity, "effort": self.config.effort}

    def body(self, request: JudgeRequest, max_output_tokens: int) -> dict[str, Any]:
        system, user = render(self._rubric, request, reply_in_json(request, rationale=self.config.rationale))
        schema = schema_of(request, rationale=self.config.rationale)
        thought = {"reasoning": {"effort": self.config.effort}} if self.config.effort else {}
        return {
            **thought,
            "model": self.config.model,
            "instructions": system["content"],
            "input": user["content"],
            "max_output_tokens": max_output_tokens,
            "store": False,  # prompts and answers are the user's, and nobody reads them again
            "text": {"format": {"type": "json_schema", "name": "verdict", "strict": True, "schema": schema}},
        }

    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        return await self.client.responses.with_raw_response.create(extra_body=body, extra_headers=headers)

    def read(self, payload: bytes, request: JudgeRequest) -> Answer:
        try:
            reply = _Response.model_validate_json(payload)
        except ValidationError as error:
            return self.no_reply(payload, "a response", error.errors()[0]["msg"])
        parts = [part for item in reply.output if item.type == "message" for part in item.content or []]
        text = "".join(part.text or "" for part in parts if part.type == "output_text")
        refusal = next((part.refusal or "refused" for part in parts if part.type == "refusal"), None)
        reason = reply.incomplete_details.reason if reply.incomplete_details else None
        outcome: Any
        if refusal is not None:
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail=self.clean(refusal))
        elif reply.status == "incomplete" and reason == "max_output_tokens":
            outcome = Undecided(reason=UndecidedReason.TRUNCATED, detail="cut off at max_output_tokens")
        elif reply.status == "incomplete" and reason == "content_filter":
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail="content filter")
        elif reply.status == "completed":
            outcome = parse_reply(text, request, rationale=self.config.rationale)
        else:
            words = reply.error.message if reply.error and reply.error.message else f"status {reply.status} {reason or ''}"
            outcome = unavailable(self.clean(words))
        usage = usage_of(_ResponsesUsage, reply.usage)
        return Answer(
            outcome,
            raw=text or refusal or "",
            usage=usage or NO_USAGE,
            served_model=reply.model or "",
            request_id=reply.id or "",
            billing=Billing.SETTLED if usage else Billing.UNKNOWN,
        )


class ChatDialect(RubricDialect):
    """Judge of kind `openai_compatible`."""

    config: OpenAICompatibleJudge

    @property
    def identity(self) -> Mapping[str, Any]:
        return {**super().identity, "temperature": self.config.temperature}

    def body(self, request: JudgeRequest, max_output_tokens: int) -> dict[str, Any]:
        schema = schema_of(request, rationale=self.config.rationale)
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": render(self._rubric, request, reply_in_json(request, rationale=self.config.rationale)),
            "max_completion_tokens": max_output_tokens,
            "response_format": {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}},
        }
        if self.config.temperature is not None:
            body["temperature"] = self.config.temperature
        return body

    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        create = self.client.chat.completions.with_raw_response.create
        return await create(model=self.config.model, messages=[], extra_body=body, extra_headers=headers)

    def read(self, payload: bytes, request: JudgeRequest) -> Answer:
        completion = read_completion(self, payload)
        if isinstance(completion, Answer):
            return completion
        choice = completion.choice
        outcome: Any
        if choice.message is None:
            outcome = malformed("the reply holds no message")
        elif choice.message.refusal:
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail=self.clean(choice.message.refusal))
        elif choice.finish_reason == "content_filter":
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail="content filter")
        elif choice.finish_reason == "length":
            outcome = Undecided(reason=UndecidedReason.TRUNCATED, detail="cut off at max_output_tokens")
        else:
            outcome = parse_reply(choice.message.content or "", request, rationale=self.config.rationale)
        return chat_answer(completion, outcome)


def read_completion(dialect: Dialect, payload: bytes) -> Completion | Answer:
    try:
        return Completion.model_validate_json(payload)
    except ValidationError as error:
        return dialect.no_reply(payload, "a chat completion", error.errors()[0]["msg"])


def chat_answer(completion: Completion, outcome: Any) -> Answer:
    message = completion.choice.message or _Message()
    usage = usage_of(ChatUsage, completion.usage)
    return Answer(
        outcome,
        raw=message.content or message.refusal or "",
        usage=usage or NO_USAGE,
        served_model=completion.model or "",
        request_id=completion.id or "",
        billing=Billing.SETTLED if usage else Billing.UNKNOWN,
    )
