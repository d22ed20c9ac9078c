"""A judge behind a network: attempts, one deadline around them, money and turns; what the vendor says is the dialect's.

    unavailable     asked again after a pause, up to max_attempts; rate limits are bounded by the deadline alone
    malformed       asked again once
    truncated       asked again once with twice the room
    all else        is the reply

The deadline counts attempts and pauses, not the time spent in the line for a turn: a slow server must not cost the last in line its
answer. A server that has answered nothing for outage_s is out: JudgeUnavailableError ends the stage, which resumes later, instead of
turning a round's prompts into undecided ones.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from dpo_loop.errors import JudgeUnavailableError
from dpo_loop.types import Outcome, Undecided, UndecidedReason, Usage
from judges.backend import BackendSpec, JudgeRequest, Reply
from judges.backoff import LONGEST_RETRY_AFTER_S, pause_s
from judges.budget import Purse, Reservation
from judges.config import RemoteJudge
from judges.dialect import Answer, Billing, Dialect, unavailable
from judges.limiter import limiter_of


@dataclass
class _Call:
    """What has come of one call so far, over its attempts."""

    request: JudgeRequest
    max_output_tokens: int
    attempts: int = 0
    failures: int = 0
    spent_s: float = 0.0
    """Attempts and pauses."""
    input_tokens: int = 0
    cached_input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    was_malformed: bool = False
    was_truncated: bool = False

    def count(self, usage: Usage) -> None:
        self.input_tokens += usage.input_tokens
        self.cached_input_tokens += usage.cached_input_tokens
        self.output_tokens += usage.output_tokens


class RemoteBackend:
    """Backend over a dialect. Of one event loop."""

    def __init__(self, config: RemoteJudge, dialect: Dialect, purse: Purse) -> None:
        url = urlsplit(config.base_url)
        origin = f"{url.scheme}://{url.netloc}{url.path.rstrip('/')}"
        self._config, self._dialect, self._purse = config, dialect, purse
        self._priced = None if config.free else config.model
        if self._priced is not None:
            purse.price_of(self._priced)
        self._spec = BackendSpec(
            name=f"{config.kind}:{config.model}",
            identity={
                "kind": config.kind,
                "origin": origin,
                "model": config.model,
                "max_output_tokens": config.max_output_tokens,
                **dialect.identity,
            },
            concurrency=config.concurrency,
            family=config.family,
        )
        self.limiter = limiter_of(origin, config.model, start=config.start_concurrency, most=config.concurrency)

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def aclose(self) -> None:
        await self._dialect.aclose()

    async def ask(self, request: JudgeRequest) -> Reply:
        call = _Call(request, self._config.max_output_tokens)
        started = time.monotonic()
        answer = await self._decide(call)
        return Reply(
            outcome=answer.outcome,
            raw=answer.raw,
            usage=Usage(
                input_tokens=call.input_tokens, cached_input_tokens=call.cached_input_tokens, output_tokens=call.output_tokens
            ),
            cost_usd=call.cost_usd,
            latency_s=round(time.monotonic() - started, 3),
            served_model=answer.served_model,
            request_id=answer.request_id,
            attempts=call.attempts,
        )

    async def _decide(self, call: _Call) -> Answer:
        before = ""
        while True:
            left_s = self._config.deadline_s - call.spent_s
            timeout_s = min(self._config.attempt_timeout_s, left_s)
            answer = await self._attempt(call, timeout_s)
            outcome = answer.outcome
            if not isinstance(outcome, Undecided) or answer.is_hopeless:
                return answer
            match outcome.reason:
                case UndecidedReason.MALFORMED if not call.was_malformed:
                    call.was_malformed = True
                case UndecidedReason.TRUNCATED if not call.was_truncated:
                    call.was_truncated = True
                    call.max_output_tokens *= 2
                case UndecidedReason.UNAVAILABLE:
                    call.failures += not answer.is_rate_limit
                    if call.spent_s >= self._config.deadline_s:
                        return self._late(answer, before)
                    if call.failures >= self._config.max_attempts:
                        return answer
                    pause = self._pause_s(call, answer)
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

    def _pause_s(self, call: _Call, answer: Answer) -> float:
        asked = min(answer.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S)
        return pause_s(call.attempts, at_least=asked)

    async def _attempt(self, call: _Call, timeout_s: float) -> Answer:
        body = self._dialect.body(call.request, call.max_output_tokens)
        num_bytes = len(json.dumps(body, ensure_ascii=False).encode(errors="replace"))
        async with self.limiter.slot() as slot:
            self._raise_on_outage()
            reserved = await self._purse.reserve(self._priced, num_bytes, call.max_output_tokens)
            started = time.monotonic()
            call.attempts += 1
            try:
                answer = await self._dialect.send(body, call.request, timeout_s=timeout_s)
            except Exception:  # it says that no further call can succeed: nothing was worked on
                await reserved.release()
                raise
            except BaseException:
                await reserved.keep()
                raise
            finally:
                call.spent_s += time.monotonic() - started
            call.count(answer.usage)
            call.cost_usd += await _pay(reserved, answer)
            match answer.outcome:
                case Undecided(reason=UndecidedReason.UNAVAILABLE, detail=detail):
                    report = slot.rate_limited if answer.is_rate_limit else slot.failed
                    report(answer.retry_after_s)
                    self._raise_on_outage(detail)
                case _:
                    slot.succeeded()
            return answer

    def _raise_on_outage(self, detail: str = "") -> None:
        since = self.limiter.troubled_since
        if since is None or not self.limiter.is_silent:
            return
        silent_s = time.monotonic() - since
        if silent_s >= self._config.outage_s:
            last = f"; the last: {detail}" if detail else ""
            raise JudgeUnavailableError(
                f"judge {self._spec.name} at {self._config.base_url} has answered nothing for {silent_s:.0f} s{last}. What was judged is kept; run "
                "the same command again when it answers."
            )


async def _pay(reserved: Reservation, answer: Answer) -> float:
    """Dollars that are known to be spent."""
    match answer.billing:
        case Billing.SETTLED:
            return await reserved.settle(answer.usage)
        case Billing.NOTHING:
            await reserved.release()
        case Billing.UNKNOWN:
            await reserved.keep()
    return 0.0


def _detail(outcome: Outcome) -> str:
    return outcome.detail if isinstance(outcome, Undecided) else ""
