"""One attempt of a call, at once: a turn, money set aside, the vendor's answer, money settled.

The deadline of a call counts attempts and pauses, not the time spent in the line for a turn: a slow server must not cost the last in line
its answer. A server that has answered nothing for outage_s is out: JudgeUnavailableError ends the stage, which resumes later, instead of
turning a round's prompts into undecided ones.
"""

from __future__ import annotations

import json
import time
from typing import Any

from dpo_loop.errors import JudgeUnavailableError
from dpo_loop.types import Undecided, UndecidedReason
from judges.backoff import LONGEST_RETRY_AFTER_S, pause_s
from judges.budget import Purse, Reservation
from judges.config import RemoteModel
from judges.dialect import Answer, Billing, Dialect
from judges.limiter import limiter_of
from judges.remote import Call, origin_of


class DirectSender:
    """Of one event loop. Raises InputError for a model without a price."""

    in_waves = False

    def __init__(self, config: RemoteModel, dialect: Dialect, purse: Purse) -> None:
        self._config, self._dialect, self._purse = config, dialect, purse
        self._priced = None if config.free else config.model
        if self._priced is not None:
            purse.price_of(self._priced)
        self._limiter = limiter_of(origin_of(config), config.model, start=config.start_concurrency, most=config.concurrency)

    @property
    def concurrency(self) -> int:
        return self._config.concurrency

    def pause_s(self, call: Call, answer: Answer) -> float:
        return pause_s(call.attempts, at_least=min(answer.retry_after_s or 0.0, LONGEST_RETRY_AFTER_S))

    def end(self, call: Call) -> None:
        """Nothing is kept of a call."""

    async def aclose(self) -> None:
        """The dialect's connections are closed by their owner."""

    async def attempt(self, call: Call, *, timeout_s: float) -> Answer:
        body = self._dialect.body(call.request, call.max_output_tokens)
        async with self._limiter.slot() as slot:
            self._raise_on_outage()
            reserved = await self._purse.reserve(self._priced, num_bytes(body), call.max_output_tokens)
            started = time.monotonic()
            call.started = call.started or started
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
            call.count(answer.usage, await _pay(reserved, answer))
            match answer.outcome:
                case Undecided(reason=UndecidedReason.UNAVAILABLE, detail=detail):
                    report = slot.rate_limited if answer.is_rate_limit else slot.failed
                    report(answer.retry_after_s)
                    self._raise_on_outage(detail)
                case _:
                    slot.succeeded()
            return answer

    def _raise_on_outage(self, detail: str = "") -> None:
        since = self._limiter.troubled_since
        if since is None or not self._limiter.is_silent:
            return
        silent_s = time.monotonic() - since
        if silent_s >= self._config.outage_s:
            last = f"; the last: {detail}" if detail else ""
            raise JudgeUnavailableError(
                f"judge {self._config.kind}:{self._config.model} at {self._config.base_url} has answered nothing for {silent_s:.0f} s{last}. What "
                "was judged is kept; run the same command again when it answers."
            )


def num_bytes(body: dict[str, Any]) -> int:
    """Of a request as it travels."""
    return len(json.dumps(body, ensure_ascii=False).encode(errors="replace"))


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
