"""Graders of kind `guard`, through vLLM's chat completions or completions; the format decides which."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from dpo_loop.types import Outcome, Undecided, UndecidedReason
from judges.backend import JudgeRequest
from judges.config import GuardGrader
from judges.dialect import NO_USAGE, Answer, Billing, malformed, usage_of
from judges.guards import FORMS
from judges.guards.form import Said
from judges.openai_dialects import ChatUsage, Lax, OpenAIDialect


class _Message(Lax):
    content: str | None = None


class _LogProbs(Lax):
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(Lax):
    """Of either API: chat completions have a message, completions a text."""

    index: int = 0
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None

    @property
    def said(self) -> Said | None:
        """None where nothing was said."""
        text = self.text if self.message is None else self.message.content
        tops = self.logprobs.top_logprobs if self.logprobs else None
        return None if text is None else Said(text, self.finish_reason or "", (tops[0] if tops else None) or {})


class _Completion(Lax):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice]
    usage: Any = None


class GuardDialect(OpenAIDialect):
    config: GuardGrader

    def __init__(self, config: GuardGrader) -> None:
        super().__init__(config)
        self._form = FORMS[config.format]

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"format": self.config.format, "format_sha256": hashlib.sha256(self._form.sees.encode()).hexdigest()}

    def body(self, request: JudgeRequest, max_output_tokens: int) -> dict[str, Any]:
        body = self._form.body(request)
        room = "max_completion_tokens" if "messages" in body else "max_tokens"
        return {"model": self.config.model, "temperature": 0.0, room: max_output_tokens, **body}

    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        sent: dict[str, Any] = {"model": self.config.model, "extra_body": body, "extra_headers": headers}
        if "messages" in body:
            return await self.client.chat.completions.with_raw_response.create(messages=[], **sent)
        return await self.client.completions.with_raw_response.create(prompt="", **sent)

    def read(self, payload: bytes, request: JudgeRequest) -> Answer:
        try:
            completion = _Completion.model_validate_json(payload)
        except ValidationError as error:
            return self.no_reply(payload, "a completion", error.errors()[0]["msg"])
        said = [choice.said for choice in sorted(completion.choices, key=lambda choice: choice.index)]
        known = [one for one in said if one is not None]
        usage = usage_of(ChatUsage, completion.usage)
        return Answer(
            self._outcome(known, request) if known and len(known) == len(said) else malformed("the reply holds no text"),
            raw="\n".join(one.text for one in known),
            usage=usage or NO_USAGE,
            served_model=completion.model or "",
            request_id=completion.id or "",
            billing=Billing.SETTLED if usage else Billing.UNKNOWN,
        )

    def _outcome(self, said: Sequence[Said], request: JudgeRequest) -> Outcome:
        if any(one.finish_reason == "content_filter" for one in said):
            return Undecided(reason=UndecidedReason.REFUSED, detail="content filter")
        if any(one.finish_reason == "length" and not one.first for one in said):  # a label alone is always cut off there
            return Undecided(reason=UndecidedReason.TRUNCATED, detail="cut off at max_output_tokens")
        return self._form.outcome(said, request)
