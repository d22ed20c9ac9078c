"""How many calls one server bears at once, found by trying: additive increase, multiplicative decrease.

    start at `start` calls, twice as many after each clean window (as many successes as the limit), until the first cut
    after it one more per clean window; never above `most`
    a rate limit: times 0.7, once per episode. Calls that were sent before a cut cannot cause another
    `retry-after` of one call holds all calls back
    turns are spread over the time that calls take: replies that come together would else be followed by calls that go together, for ever,
    and both sides would work in bursts and wait between them

An outage opens the circuit: after max(10, 2 x limit) failures in a row one call at a time is let through, after pauses of 1 s that
double up to 30 s, until one succeeds.

Chiu and Jain, "Analysis of the increase and decrease algorithms for congestion avoidance", 1989.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import Any
from weakref import WeakKeyDictionary

from judges.backoff import LONGEST_RETRY_AFTER_S

CUT = 0.7
FEWEST_FAILURES = 10
FIRST_PROBE_S = 1.0
LONGEST_PROBE_S = 30.0
SMOOTHING = 0.1
"""Weight of the newest call in the time that calls take."""
PACE = 0.8
"""Of the even distance between turns (a call's time over the limit), so that it never is what keeps a call waiting."""
CATCH_UP_S = 0.01
"""Turns that a busy event loop gave late are made up for, up to so much."""


class Limiter:
    """Of one event loop. `async with limiter.slot() as slot` waits for a turn; then at most one of the slot's three reports is made."""

    def __init__(self, *, start: int, most: int) -> None:
        self._limit = float(min(start, most))
        self._most = most
        self._grows_fast = True
        self._clean = 0
        self._episode = 0
        self._under_way = 0
        self._line: deque[asyncio.Future[int]] = deque()
        self._not_before = 0.0
        self._takes_s = 0.0
        """A call that succeeds, smoothed; 0 until one has."""
        self._next_turn_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._failures = 0
        self._probe_s = 0.0
        self.troubled_since: float | None = None
        """Of time.monotonic(): the first failure or rate limit after the last success."""
        self._num_rate_limited = 0
        self._num_outages = 0

    def slot(self) -> Slot:
        return Slot(self)

    @property
    def is_open(self) -> bool:
        """The circuit: the server is taken to be down, and only probed."""
        return self._probe_s > 0

    @property
    def is_silent(self) -> bool:
        """So many attempts in a row got no answer that it is not one call's bad luck."""
        return self._failures >= FEWEST_FAILURES

    def figures(self) -> dict[str, Any]:
        return {"concurrency": int(self._limit), "rate_limited": self._num_rate_limited, "outages": self._num_outages}

    # ------------------------------------------------------------------------------------------------------------- turns

    async def enter(self) -> int:
        """Waits for a turn; the number of the episode it falls into."""
        turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._line.append(turn)
        self._wake()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        self._under_way -= 1
        self._wake()

    def _wake(self) -> None:
        now = time.monotonic()
        room = 1 if self.is_open else max(1, int(self._limit))
        while self._line and self._under_way < room:
            wait_s = max(self._not_before, self._next_turn_at) - now
            if wait_s > 0:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(wait_s, self._on_time)
                return
            turn = self._line.popleft()
            if not turn.done():
                self._under_way += 1
                self._next_turn_at = max(self._next_turn_at, now - CATCH_UP_S) + PACE * self._takes_s / room
                turn.set_result(self._episode)

    def _on_time(self) -> None:
        self._timer = None
        self._wake()

    # ------------------------------------------------------------------------------------------------------------ reports

    def succeeded(self, took_s: float) -> None:
        self._failures, self._probe_s, self.troubled_since = 0, 0.0, None
        self._takes_s += SMOOTHING * (took_s - self._takes_s) if self._takes_s else took_s
        self._clean += 1
        if self._clean >= self._limit:
            self._clean = 0
            self._limit = min(self._most, self._limit * 2 if self._grows_fast else self._limit + 1)

    def rate_limited(self, episode: int, retry_after_s: float | None) -> None:
        self._num_rate_limited += 1
        self._trouble()
        self._hold_back(retry_after_s or 0.0)
        if episode == self._episode:
            self._episode += 1
            self._grows_fast, self._clean = False, 0
            self._limit = max(1.0, CUT * min(self._limit, self._under_way))

    def failed(self, episode: int, retry_after_s: float | None) -> None:
        self._trouble()
        self._clean = 0
        self._hold_back(retry_after_s or 0.0)
        is_probe = self.is_open and episode == self._episode
        if is_probe or (not self.is_open and self._failures >= max(FEWEST_FAILURES, 2 * int(self._limit))):
            self._num_outages += not self.is_open
            self._episode += 1  # calls that are still under way are no probes
            self._probe_s = min(LONGEST_PROBE_S, self._probe_s * 2 or FIRST_PROBE_S)
            self._hold_back(self._probe_s)

    def _trouble(self) -> None:
        self._failures += 1
        if self.troubled_since is None:
            self.troubled_since = time.monotonic()

    def _hold_back(self, wait_s: float) -> None:
        self._not_before = max(self._not_before, time.monotonic() + min(wait_s, LONGEST_RETRY_AFTER_S))


class Slot:
    """One call's turn. No report at all is neutral: the reply was of no use, the server is well."""

    __slots__ = ("_episode", "_limiter", "_started")

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._episode = 0
        self._started = 0.0

    async def __aenter__(self) -> Slot:
        self._episode = await self._limiter.enter()
        self._started = time.monotonic()
        return self

    async def __aexit__(self, *error: object) -> None:
        self._limiter.leave()

    def succeeded(self) -> None:
        self._limiter.succeeded(time.monotonic() - self._started)

    def rate_limited(self, retry_after_s: float | None) -> None:
        """429. retry_after_s: what the server asks for."""
        self._limiter.rate_limited(self._episode, retry_after_s)

    def failed(self, retry_after_s: float | None) -> None:
        """5xx, no connection, time-out."""
        self._limiter.failed(self._episode, retry_after_s)


_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[str, str], Limiter]] = WeakKeyDictionary()


def limiter_of(origin: str, model: str, *, start: int, most: int) -> Limiter:
    """The one that all judges of this event loop share which ask the same model at the same place."""
    mine = _limiters.setdefault(asyncio.get_running_loop(), {})
    return mine.setdefault((origin, model), Limiter(start=start, most=most))
