"""What differs from vendor to vendor: the body of a request, how it is sent, and what a reply or an error means.

A *dialect* sends once. It retries nothing, waits for nobody, spends no money and knows no ledger: remote.py does that, the same for all.
Failures, and what becomes of them (facts/judges.md §9.6):

    408 409 429 5xx, connection, time-out          undecided(unavailable), worth another attempt
    200 that is not a reply, not a verdict         undecided(malformed)
    cut off at the token limit                     undecided(truncated)
    refusal, content filter                        undecided(refused), final
    does not fit the judge's context               undecided(truncated), hopeless
    400 after others were answered                 undecided(malformed), hopeless
    other 4xx, quota used up                       JudgeError with the provider's words: no further call can succeed
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import aiohttp
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_loop.errors import InputError, JudgeError
from dpo_loop.types import Outcome, Undecided, UndecidedReason, Usage
from judges.backend import JudgeRequest
from judges.backoff import retry_after_s

if TYPE_CHECKING:
    from judges.config import RemoteModel

_RETRIED_STATUSES = {408, 409, 429}
_WORKED_ON_STATUSES = {408, 504, 522, 524}
"""Time-outs on the way: the model may have answered, and have been billed, for nobody."""
_QUOTA = re.compile(r"insufficient_quota|billing_hard_limit|billing_not_active|spend_limit|credit balance", re.IGNORECASE)
_TOO_LONG = re.compile(r"context.length|context.window|maximum context|too long|too many tokens", re.IGNORECASE)
_FILTERED = re.compile(r"content.(filter|policy|management)|invalid_prompt|usage polic", re.IGNORECASE)


class Billing(StrEnum):
    """What an attempt did cost."""

    SETTLED = "settled"
    """Its usage is known."""
    NOTHING = "nothing"
    """Refused before any work: 4xx, 429, 5xx, never connected."""
    UNKNOWN = "unknown"
    """Time-out, dropped connection, a 200 without usage: it may have been billed."""


NO_USAGE = Usage()


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one attempt. is_hopeless: asking again, in whatever way, would buy the same."""

    outcome: Outcome
    raw: str = ""
    usage: Usage = NO_USAGE
    served_model: str = ""
    request_id: str = ""
    billing: Billing = Billing.SETTLED
    is_rate_limit: bool = False
    retry_after_s: float | None = None
    is_hopeless: bool = False


class StatedUsage(BaseModel, ABC):
    """Of a vendor, as its JSON states it."""

    model_config = ConfigDict(extra="ignore")

    @property
    @abstractmethod
    def ours(self) -> Usage: ...


def usage_of(shape: type[StatedUsage], stated: Any) -> Usage | None:
    """None where it is missing or cannot be true: then nobody knows what the call did cost."""
    try:
        return shape.model_validate(stated).ours
    except ValidationError:
        return None


class Dialect(ABC):
    """Sends through a vendor's SDK with its own retries off, and classifies what it raises.

    The key, the base URL and the model come from the config alone, never from `OPENAI_*` or `ANTHROPIC_*` variables. Its connections are
    aiohttp's, which the SDKs offer in place of their own: a call costs a quarter less, and a pool of hundreds no more than a small one.
    """

    def __init__(self, config: RemoteModel, sdk: Any) -> None:
        key = os.environ.get(config.api_key_env, "") if config.api_key_env else "none"
        if not key:
            raise InputError(
                f"judge.api_key_env: the environment variable {config.api_key_env} is not set. Export the key of {config.base_url} under that name "
                "(any word for a server that asks for none)."
            )
        self.config, self.key, self.sdk = config, key, sdk
        self._lengths = True
        self.has_answered = False
        """Then the settings are right, and a request that is refused is refused for what is in it."""
        self.client = self.connect(sdk.DefaultAioHttpClient(timeout=config.attempt_timeout_s))

    path: str
    """Of the API, as the lines of OpenAI's batches name it."""

    @property
    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """All of its settings that may change an answer, as JSON; part of every key."""

    @abstractmethod
    def connect(self, http: Any) -> Any:
        """A client of the SDK over these connections."""

    @abstractmethod
    def body(self, request: JudgeRequest, max_output_tokens: int) -> dict[str, Any]: ...

    @abstractmethod
    async def post(self, body: dict[str, Any], headers: dict[str, str]) -> Any:
        """The raw response of the SDK's `create`."""

    @abstractmethod
    def read(self, payload: bytes, request: JudgeRequest) -> Answer:
        """What a body of status 200 says."""

    async def aclose(self) -> None:
        await self.client.close()

    async def send(self, body: dict[str, Any], request: JudgeRequest, *, timeout_s: float) -> Answer:
        """Raises JudgeError for what no further call can mend: credentials, quota, unknown model, a request refused as such."""
        # vLLM and others give no request id of their own; with this one a provider's log can be matched with the ledger.
        headers = {"X-Client-Request-Id": request.key}
        with_lengths = self._lengths
        try:
            # The SDK's time-out is per read, so a server that trickles bytes would never meet it.
            async with asyncio.timeout(timeout_s):
                response = await self.post(self.as_sent(body), headers)
        except TimeoutError:
            return Answer(unavailable(f"no reply within {timeout_s:g} s"), billing=Billing.UNKNOWN)
        except self.sdk.APIError as error:
            if self.is_about_lengths(getattr(error, "status_code", 0), error.message) and with_lengths:
                return await self.send(body, request, timeout_s=timeout_s)
            return self.of_exception(error)
        answer = self.read(response.http_response.content, request)
        self.has_answered |= answer.billing is Billing.SETTLED
        request_id = response.headers.get("x-request-id") or response.headers.get("request-id")
        return _named(answer, request_id) if request_id else answer

    def as_sent(self, body: dict[str, Any]) -> dict[str, Any]:
        """A body in the form that this server takes, as far as is known."""
        return body if self._lengths else dict(without_lengths(body))

    def is_about_lengths(self, status: int, words: str) -> bool:
        """Whether the server refuses limits of length in a schema, as OpenAI does for fine-tuned models. From then on none is sent."""
        if status == 400 and "maxLength" in words:
            self._lengths = False
            return True
        return False

    def of_exception(self, error: Any) -> Answer:
        """Of an APIError of the SDK. Raises JudgeError for what no further call can mend."""
        if isinstance(error, self.sdk.APIStatusError):
            return self.of_error(
                error.status_code, words_of(error.body, error.message), error.response.headers, error.request_id or ""
            )
        words = self.clean(f"{error} {error.__cause__ or ''}")
        return Answer(unavailable(words), billing=Billing.UNKNOWN if _may_be_sent(error) else Billing.NOTHING)

    def of_error(self, status: int, words: str, headers: Mapping[str, str], request_id: str = "") -> Answer:
        """words: all that the provider says, its codes included."""
        words = self.clean(words)
        is_rate_limit = status == 429
        if status in (400, 429) and _QUOTA.search(words):
            raise JudgeError(f"judge {self.where}: the quota is used up: {words}. Raise it, then run the same command again.")
        if status in _RETRIED_STATUSES or status >= 500:
            return Answer(
                unavailable(f"HTTP {status}: {words}"),
                request_id=request_id,
                billing=Billing.UNKNOWN if status in _WORKED_ON_STATUSES else Billing.NOTHING,
                is_rate_limit=is_rate_limit,
                retry_after_s=retry_after_s(headers, now=time.time()),
            )
        outcome: Undecided
        if status == 413 or (status == 400 and _TOO_LONG.search(words)):
            outcome = Undecided(reason=UndecidedReason.TRUNCATED, detail=f"does not fit the judge's context: {words}")
        elif status == 400 and _FILTERED.search(words):
            outcome = Undecided(reason=UndecidedReason.REFUSED, detail=words)
        elif status == 422:
            return Answer(malformed(f"HTTP 422: {words}"), request_id=request_id, billing=Billing.NOTHING)
        elif status == 400 and self.has_answered:
            outcome = malformed(f"the server refuses this one request: HTTP 400: {words}")
        else:
            raise JudgeError(f"judge {self.where} cannot be used: HTTP {status}: {words}. {self._way_out(status)}")
        return Answer(outcome, request_id=request_id, billing=Billing.NOTHING, is_hopeless=True)

    @property
    def where(self) -> str:
        return f"{self.config.model} at {self.config.base_url}"

    def clean(self, words: str) -> str:
        """One line of a provider's words, without our key, which some servers echo."""
        if len(self.key) >= 8:
            words = words.replace(self.key, "(key)")
        return re.sub(r"\s+", " ", words).strip()[:500]

    def no_reply(self, payload: bytes, what: str, why: str) -> Answer:
        """Of a 200 that cannot be read as a reply: what it cost is not known."""
        text = self.clean(payload.decode(errors="replace"))
        return Answer(
            malformed(f"the server answered 200 with something that is not {what}: {why}"), raw=text, billing=Billing.UNKNOWN
        )

    def _way_out(self, status: int) -> str:
        match status:
            case 401 | 403:
                return f"Check the key in {self.config.api_key_env} and what it may use."
            case 402:
                return "Check the account's billing."
            case 404:
                return "Check judge.model and judge.base_url: with the API's prefix (mostly /v1) for OpenAI's APIs, without it for Anthropic's."
            case _:
                return "The server refuses the request itself, so every call would fail: check the judge's settings against its documentation."


def words_of(body: Any, message: str = "") -> str:
    """A provider's message, from the JSON of an error, and its codes where the message does not repeat them. message: where the JSON holds none."""
    said = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(said, dict):
        return re.sub(r"^Error code: \d+ - ", "", message) or str(said)
    message = str(said.get("message") or re.sub(r"^Error code: \d+ - ", "", message) or said)
    codes = {str(code) for name in ("type", "code", "error_code") if (code := said.get(name))}
    missing = sorted(code for code in codes if code not in message)
    return f"{message} ({', '.join(missing)})" if missing else message


def _may_be_sent(error: Exception) -> bool:
    """By aiohttp's own error: the SDK and its HTTP library call a connection that was cut after the request a failure to connect too."""
    cause = error.__cause__.__cause__ if error.__cause__ else None
    return not isinstance(cause, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)


def without_lengths(body: Any) -> Any:
    """The same request with no `maxLength` in its schema."""
    match body:
        case dict():
            return {name: without_lengths(value) for name, value in body.items() if name != "maxLength"}
        case _:
            return body


def unavailable(detail: str) -> Undecided:
    return Undecided(reason=UndecidedReason.UNAVAILABLE, detail=detail)


def malformed(detail: str) -> Undecided:
    return Undecided(reason=UndecidedReason.MALFORMED, detail=detail)


def _named(answer: Answer, request_id: str) -> Answer:
    return Answer(
        answer.outcome, answer.raw, answer.usage, answer.served_model, request_id, answer.billing, is_hopeless=answer.is_hopeless
    )
