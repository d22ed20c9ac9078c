"""Judge of kind `openai`: chat completions with a JSON schema, at OpenAI, vLLM or any server that speaks the same.

The SDK's own retries are off: they would multiply time-outs and hide rate limits. Ours are bounded twice, by a number of attempts and by
one deadline around all of them. The key, the base URL and the model come from the config alone, never from `OPENAI_*` variables.
Failures, and what becomes of them (facts/judges.md §9.6):

    408 409 429 5xx, connection, time-out          asked again after a pause; undecided(unavailable) in the end
    200 that is not a completion, not a verdict    asked again once; undecided(malformed)
    cut off at the token limit                     asked again once with twice the limit; undecided(truncated)
    refusal, content filter                        undecided(refused), final
    does not fit the judge's context               undecided(truncated)
    other 4xx, quota used up                       JudgeError with the provider's words: no further call can succeed
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_loop.errors import InputError, JudgeError
from dpo_loop.types import Outcome, Undecided, UndecidedReason, Usage
from judges.backend import BackendSpec, JudgeRequest, Reply
from judges.backoff import LONGEST_RETRY_AFTER_S, pause_s, retry_after_s
from judges.ballot import parse_verdict
from judges.config import OpenAIJudge
from judges.rubric import VERDICT_SCHEMA, VERDICT_SCHEMA_WITHOUT_LENGTHS, load_rubric, render

_RETRIED_STATUSES = {408, 409, 429}
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_TOO_LONG = re.compile(r"context.length|context.window|maximum context|too long|too many tokens", re.IGNORECASE)
_FILTERED = re.compile(r"content.(filter|policy|management)", re.IGNORECASE)


class _Read(BaseModel):
    """What is read of a reply. The SDK hands a 200 through whatever it holds (HTML as a `str`, another shape as a record full of
    None, broken JSON as a bare ValueError), so the body is validated here, once, against the few fields that count."""

    model_config = ConfigDict(extra="ignore")


class _Message(_Read):
    content: str | None = None
    refusal: str | None = None


class _Choice(_Read):
    message: _Message | None = None
    finish_reason: str | None = None


class _Usage(_Read):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Completion(_Read):
    id: str | None = None
    model: str | None = None
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass
class _Call:
    """What has come of one call so far, over its attempts."""

    request: JudgeRequest
    max_output_tokens: int
    started: float = field(default_factory=time.monotonic)
    attempts: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    raw: str = ""
    served_model: str = ""
    request_id: str = ""
    outcome: Outcome | None = None
    retry_after_s: float | None = None
    was_malformed: bool = False
    was_truncated: bool = False

    def reply(self, outcome: Outcome) -> Reply:
        return Reply(
            outcome=outcome,
            raw=self.raw,
            usage=Usage(input_tokens=self.input_tokens, output_tokens=self.output_tokens),
            latency_s=round(time.monotonic() - self.started, 3),
            served_model=self.served_model,
            request_id=self.request_id,
            attempts=self.attempts,
        )


class OpenAIBackend:
    def __init__(self, config: OpenAIJudge) -> None:
        key = os.environ.get(config.api_key_env, "")
        if not key:
            raise InputError(
                f"judge.api_key_env: the environment variable {config.api_key_env} is not set. Export the key of {config.base_url} under that name "
                "(any word for a server that asks for none)."
            )
        self._config, self._key = config, key
        self._rubric = load_rubric(config.rubric)
        origin = urlsplit(config.base_url)
        self._spec = BackendSpec(
            name=f"openai:{config.model}",
            identity={
                "kind": "openai",
                "origin": f"{origin.scheme}://{origin.netloc}{origin.path.rstrip('/')}",
                "model": config.model,
                "temperature": config.temperature,
                "max_output_tokens": config.max_output_tokens,
                **self._rubric.identity,
            },
            concurrency=config.concurrency,
        )
        self._client = openai.AsyncOpenAI(api_key=key, base_url=config.base_url, max_retries=0, timeout=config.attempt_timeout_s)
        self._schema = VERDICT_SCHEMA
        self._slots = asyncio.Semaphore(config.concurrency)
        self._not_before = 0.0  # of time.monotonic(): a server that asks one call to wait asks all of them

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def aclose(self) -> None:
        await self._client.close()

    async def ask(self, request: JudgeRequest) -> Reply:
        async with self._slots:
            call = _Call(request, self._config.max_output_tokens)
            try:
                async with asyncio.timeout(self._config.deadline_s):
                    return call.reply(await self._decide(call))
            except TimeoutError:
                before = f"; before that: {call.outcome.detail}" if isinstance(call.outcome, Undecided) else ""
                return call.reply(_unavailable(f"no decision within deadline_s = {self._config.deadline_s:g}{before}"))

    # ------------------------------------------------------------------------------------------------------- attempts

    async def _decide(self, call: _Call) -> Outcome:
        while True:
            await asyncio.sleep(max(0.0, self._not_before - time.monotonic()))
            call.attempts += 1
            outcome = call.outcome = await self._attempt(call)
            if call.attempts >= self._config.max_attempts or not self._is_worth_another(call, outcome):
                return outcome
            if isinstance(outcome, Undecided) and outcome.reason is UndecidedReason.UNAVAILABLE:
                pause = self._pause_s(call)
                if time.monotonic() + pause >= call.started + self._config.deadline_s:
                    return _unavailable(f"{outcome.detail} (another attempt would have to wait {pause:.1f} s, past the deadline)")
                await asyncio.sleep(pause)

    def _is_worth_another(self, call: _Call, outcome: Outcome) -> bool:
        match outcome:
            case Undecided(reason=UndecidedReason.UNAVAILABLE):
                return True
            case Undecided(reason=UndecidedReason.MALFORMED):
                again, call.was_malformed = not call.was_malformed, True
                return again
            case Undecided(reason=UndecidedReason.TRUNCATED):
                again = not call.was_truncated
                call.was_truncated, call.max_output_tokens = True, 2 * self._config.max_output_tokens
                return again
            case _:
                return False

    def _pause_s(self, call: _Call) -> float:
        if call.retry_after_s is None:
            return pause_s(call.attempts)
        asked = min(call.retry_after_s, LONGEST_RETRY_AFTER_S)
        self._not_before = max(self._not_before, time.monotonic() + asked)
        return pause_s(call.attempts, at_least=asked)

    async def _attempt(self, call: _Call) -> Outcome:
        call.retry_after_s = None
        schema = self._schema
        try:
            # The SDK's time-out is per read, so a server that trickles bytes would never meet it.
            async with asyncio.timeout(self._config.attempt_timeout_s):
                response = await self._client.chat.completions.with_raw_response.create(**self._body(call))
        except TimeoutError:
            return _unavailable(f"no reply within attempt_timeout_s = {self._config.attempt_timeout_s:g}")
        except openai.APIStatusError as error:
            if error.status_code == 400 and "maxLength" in error.message and schema is VERDICT_SCHEMA:
                self._schema = VERDICT_SCHEMA_WITHOUT_LENGTHS
                return await self._attempt(call)
            return self._of_status(call, error)
        except openai.APIConnectionError as error:
            return _unavailable(self._clean(f"{error} {error.__cause__ or ''}"))
        call.request_id = response.headers.get("x-request-id") or ""
        return self._of_body(call, response.content)

    def _body(self, call: _Call) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": render(self._rubric, call.request),
            "max_completion_tokens": call.max_output_tokens,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": self._schema},
            },
            # vLLM and others give no request id of their own; with this one a provider's log can be matched with the ledger.
            "extra_headers": {"X-Client-Request-Id": call.request.key},
        }
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        return body

    # ------------------------------------------------------------------------------------------------------- replies

    def _of_body(self, call: _Call, body: bytes) -> Outcome:
        """Usage is counted before the verdict is looked at: an unreadable one has been paid for, too."""
        call.raw = self._clean(body.decode(errors="replace"))
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError as error:
            return _malformed(f"the server answered 200 with something that is not a chat completion: {error.errors()[0]['msg']}")
        call.served_model = completion.model or ""
        call.request_id = call.request_id or completion.id or ""
        if completion.usage:
            call.input_tokens += completion.usage.prompt_tokens
            call.output_tokens += completion.usage.completion_tokens
        choice = completion.choices[0] if completion.choices else _Choice()
        if choice.message is None:
            return _malformed("the reply holds no message")
        call.raw = choice.message.content or choice.message.refusal or ""
        if choice.message.refusal:
            return Undecided(reason=UndecidedReason.REFUSED, detail=self._clean(choice.message.refusal))
        if choice.finish_reason == "content_filter":
            return Undecided(reason=UndecidedReason.REFUSED, detail="content filter")
        if choice.finish_reason == "length":
            return Undecided(reason=UndecidedReason.TRUNCATED, detail=f"cut off at max_output_tokens = {call.max_output_tokens}")
        return parse_verdict(call.raw)

    def _of_status(self, call: _Call, error: openai.APIStatusError) -> Outcome:
        words = self._clean(error.message.removeprefix(f"Error code: {error.status_code} - "))
        call.request_id = error.request_id or call.request_id
        call.raw = ""
        if error.status_code == 429 and _QUOTA_CODES & {error.code, error.type}:
            raise JudgeError(f"judge {self._where}: the quota is used up: {words}. Raise it, then run the same command again.")
        if error.status_code in _RETRIED_STATUSES or error.status_code >= 500:
            call.retry_after_s = retry_after_s(error.response.headers, now=time.time())
            return _unavailable(f"HTTP {error.status_code}: {words}")
        about = f"{error.code} {error.type} {words}"
        if error.status_code == 413 or (error.status_code == 400 and _TOO_LONG.search(about)):
            call.was_truncated = True  # more room for the reply would not help
            return Undecided(reason=UndecidedReason.TRUNCATED, detail=f"does not fit the judge's context: {words}")
        if error.status_code == 400 and _FILTERED.search(about):
            return Undecided(reason=UndecidedReason.REFUSED, detail=words)
        if error.status_code == 422:
            return _malformed(f"HTTP 422: {words}")
        raise JudgeError(
            f"judge {self._where} cannot be used: HTTP {error.status_code}: {words}. {self._way_out(error.status_code)}"
        )

    @property
    def _where(self) -> str:
        return f"{self._config.model} at {self._config.base_url}"

    def _way_out(self, status: int) -> str:
        match status:
            case 401 | 403:
                return f"Check the key in {self._config.api_key_env} and what it may use."
            case 402:
                return "Check the account's billing."
            case 404:
                return "Check judge.model, and that judge.base_url ends with the API's prefix (mostly /v1)."
            case _:
                return "The server refuses the request itself, so every call would fail: check the judge's settings against its documentation."

    def _clean(self, words: str) -> str:
        """One line of a provider's words, without our key, which some servers echo."""
        if len(self._key) >= 8:
            words = words.replace(self._key, "(key)")
        return re.sub(r"\s+", " ", words).strip()[:500]


def _unavailable(detail: str) -> Undecided:
    return Undecided(reason=UndecidedReason.UNAVAILABLE, detail=detail)


def _malformed(detail: str) -> Undecided:
    return Undecided(reason=UndecidedReason.MALFORMED, detail=detail)
