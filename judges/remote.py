"""A judge behind a network: attempts until there is an answer, and a deadline around them; what the vendor says is the dialect's.

    unavailable     asked again after a pause, up to max_attempts; rate limits, where each is an attempt of its own, by the deadline alone
    malformed       asked again once
    truncated       asked again once with twice the room
    all else        is the reply

How an attempt is made is the *sender*'s: at once (direct.py), or as a line of a batch (batches/).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import urlsplit

from dpo_loop.types import Outcome, Undecided, UndecidedReason, Usage
from judges.backend import BackendSpec, JudgeRequest, Reply
from judges.config import RemoteModel, VllmRunBatchJudge
from judges.dialect import Answer, Dialect, unavailable
from judges.weights import weights_identity


@dataclass
class Call:
    """What has come of one call so far, over its attempts."""

    request: JudgeRequest
    max_output_tokens: int
    started: float = 0.0
    """Of time.monotonic(): the first attempt, after its wait in line."""
    attempts: int = 0
    failures: int = 0
    spent_s: float = 0.0
    """Attempts and pauses, as far as they count for the deadline."""
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    was_malformed: bool = False
    was_truncated: bool = False

    def count(self, usage: Usage, cost_usd: float) -> None:
        self.input_tokens += usage.input_tokens
        self.cached_input_tokens += usage.cached_input_tokens
        self.output_tokens += usage.output_tokens
        self.cost_usd += cost_usd


class Sender(Protocol):
    """One attempt at a time for each call. in_waves: an answer takes so long that calls should not wait for one another."""

    @property
    def concurrency(self) -> int: ...

    @property
    def in_waves(self) -> bool: ...

    async def attempt(self, call: Call, *, timeout_s: float) -> Answer:
        """Counts into `call` the attempt, its time, usage and cost. Raises JudgeError, JudgeUnavailableError, BudgetExceededError."""
        ...

    def pause_s(self, call: Call, answer: Answer) -> float:
        """Before the next attempt, after one that was unavailable."""
        ...

    def end(self, call: Call) -> None:
        """The last that happens to a call before its reply goes to the ledger, in the same turn of the event loop."""
        ...

    async def aclose(self) -> None: ...


def origin_of(config: RemoteModel) -> str:
    url = urlsplit(config.base_url)
    return f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"


def identity_of(config: RemoteModel, dialect: Dialect) -> dict[str, Any]:
    """Of every call's key: how it is asked in this sense, not how it travels."""
    local = {**weights_identity(config.weights), "args": config.args} if isinstance(config, VllmRunBatchJudge) else {}
    return {
        "kind": config.kind,
        "origin": origin_of(config),
        "model": config.model,
        "revision": config.revision,
        "max_output_tokens": config.max_output_tokens,
        **dialect.identity,
        **local,
    }


class RemoteBackend:
    """Backend over a dialect and a sender. Of one event loop."""

    def __init__(self, config: RemoteModel, dialect: Dialect, sender: Sender, identity: Mapping[str, Any]) -> None:
        """identity: as `identity_of` gives it."""
        self._config, self._dialect, self._sender = config, dialect, sender
        self._spec = BackendSpec(
            name=f"{config.kind}:{config.model}",
            identity=identity,
            concurrency=sender.concurrency,
            in_waves=sender.in_waves,
            family=config.family,
        )

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def aclose(self) -> None:
        await self._sender.aclose()
        await self._dialect.aclose()

    async def ask(self, request: JudgeRequest) -> Reply:
        call = Call(request, self._config.max_output_tokens)
        answer = await self._decide(call)
        self._sender.end(call)
        return Reply(
            outcome=answer.outcome,
            raw=answer.raw,
            usage=Usage(
                input_tokens=call.input_tokens, cached_input_tokens=call.cached_input_tokens, output_tokens=call.output_tokens
            ),
            cost_usd=call.cost_usd,
            latency_s=round(time.monotonic() - call.started, 3),
            served_model=answer.served_model,
            request_id=answer.request_id,
            attempts=call.attempts,
        )

    async def _decide(self, call: Call) -> Answer:
        before, truncated = "", None
        while True:
            left_s = self._config.deadline_s - call.spent_s
            answer = await self._sender.attempt(call, timeout_s=min(self._config.attempt_timeout_s, left_s))
            outcome = answer.outcome
            if not isinstance(outcome, Undecided):
                return answer
            if answer.is_hopeless:  # more room may be more than the model has
                return truncated or answer
            match outcome.reason:
                case UndecidedReason.MALFORMED if not call.was_malformed:
                    call.was_malformed = True
                case UndecidedReason.TRUNCATED if not call.was_truncated:
                    call.was_truncated, truncated = True, answer
                    call.max_output_tokens *= 2
                case UndecidedReason.UNAVAILABLE:
                    call.failures += not answer.is_rate_limit
                    if call.spent_s >= self._config.deadline_s:
                        return self._late(answer, before)
                    if call.failures >= self._config.max_attempts:
                        return answer
                    pause = self._sender.pause_s(call, answer)
                    if call.spent_s + pause >= self._config.deadline_s:
                        words = f"{outcome.detail} (another attempt would have to wait {pause:.1f} s, past the deadline)"
                        return Answer(unavailable(words), request_id=answer.request_id)
                    await asyncio.sleep(pause)
                    call.spent_s += pause
                case _:
                    return answer
            before = outcome.detail
            if call.spent_s >= self._config.deadline_s:
                return self._late(answer, "")

    def _late(self, answer: Answer, before: str) -> Answer:
        """Of a call whose deadline has passed."""
        said = before or _detail(answer.outcome)
        return Answer(unavailable(f"no decision within deadline_s = {self._config.deadline_s:g}; before that: {said}"))


def _detail(outcome: Outcome) -> str:
    return outcome.detail if isinstance(outcome, Undecided) else ""
