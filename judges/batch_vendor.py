"""The seam to whoever runs batches: one set of calls in, an id back, rows later.

A *plan* is one batch as we know it: an id of our own, written down with its keys before anything is sent. A *row* is what became of one
call of it. Vendor code sends, looks and reads; it keeps nothing, retries nothing and never decides what a row means.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

NEVER_RAN = 0
"""Status of a row that the vendor did not get to: expired or cancelled. Nothing was billed for it."""


@dataclass(frozen=True, slots=True)
class Line:
    """key: 64 hex digits, the call's id at the vendor. body: as for a direct call."""

    key: str
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """id: 64 hex digits over the keys and how often they were planned. made_at: seconds since 1970, before anything was sent."""

    id: str
    num_rows: int
    made_at: float


@dataclass(frozen=True, slots=True)
class Row:
    """status: as of a direct call (200: payload is the body of a reply), or NEVER_RAN. payload: bytes of the body or of the error."""

    key: str
    status: int
    payload: bytes


class BatchState(Enum):
    RUNNING = "running"
    ENDED = "ended"
    """Rows can be read; after an expiry some never ran."""
    CANCELLED = "cancelled"
    """Somebody stopped it at the vendor; rows that ran can be read."""
    FAILED = "failed"
    """Refused as a whole, nothing ran."""


@dataclass(frozen=True, slots=True)
class Look:
    """words: the vendor's, where something went wrong. may_pass: a failure that time mends (a full queue)."""

    state: BatchState
    words: str = ""
    may_pass: bool = False


class BatchVendor(Protocol):
    """Every method raises JudgeUnavailableError for what may pass (outage, rate limit, time-out) and JudgeError for what will not
    (credentials, quota, a request that is refused as such), with the vendor's words."""

    @property
    def name(self) -> str: ...

    @property
    def most_rows(self) -> int: ...

    @property
    def most_bytes(self) -> int:
        """Of one batch, as sent."""

    @property
    def finds_by_guess(self) -> bool:
        """Whether a batch that `find` gives may be somebody else's, which only its rows can tell."""

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:
        """Send the batch; its id at the vendor. After JudgeUnavailableError it may have been made all the same: look with `find`."""

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        """The id of a batch that was made for this plan though its id was never written down. known: ids that are of other plans."""

    async def look(self, batch_id: str) -> Look: ...

    def rows(self, batch_id: str) -> AsyncIterator[Row]:
        """In any order; some may be missing or come twice."""

    async def aclose(self) -> None: ...
