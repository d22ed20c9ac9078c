"""The seam to whoever runs batches: a set of calls in, an id back, rows later.

A *line* is one attempt of one call. A *plan* is one batch as we know it: an id of our own, written down with its lines before anything is
sent. A *row* is what became of one line. A vendor sends, looks and reads; it keeps nothing, retries nothing and never decides what a row means.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import aiohttp
import httpx2

from dpo_loop.errors import JudgeError, JudgeUnavailableError
from dpo_loop.types import Undecided, UndecidedReason
from judges.dialect import Dialect, words_of

Made = TypeVar("Made")
LATER = "What was judged is kept; run the same command again."

NEVER_RAN = 0
"""Status of a row that the vendor did not get to: expired or cancelled. Nothing was billed for it."""
CALL_TIMEOUT_S = 600.0
"""Of one call about a batch; the upload of a full one is the longest."""
CLOCK_SKEW_S = 900
"""How far the vendor's clock may be from ours."""


@dataclass(frozen=True, slots=True)
class Line:
    """id: 64 hex digits, what the vendor calls the line. key: of the call in the ledger. body: as for a direct call."""

    id: str
    key: str
    body: Mapping[str, Any]
    max_output_tokens: int


def line_id(key: str, attempt: int) -> str:
    """The call's key for the first attempt; every attempt is a line of its own, so a repeat finds the rows of all of them."""
    return key if attempt == 1 else hashlib.sha256(f"{key} {attempt}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Plan:
    """id: 64 hex digits. made_at: seconds since 1970, before anything was sent. vendor_id: once it is known."""

    id: str
    num_lines: int
    num_bytes: int
    made_at: float
    vendor_id: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """status: as of a direct call (200: payload is the body of a reply), or NEVER_RAN. payload: bytes of the body or of the error."""

    line: str
    status: int
    payload: bytes = b""


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
    """num_rows: lines that are done, and whose rows can be read when it has ended; None where it is not told: then all of them. words: the vendor's,
    where something went wrong. may_pass: a failure that time mends (a full queue)."""

    state: BatchState
    num_rows: int | None = None
    words: str = ""
    may_pass: bool = False


class BatchVendor(Protocol):
    """Every method raises JudgeUnavailableError for what may pass (outage, rate limit, time-out) and JudgeError for what will not
    (credentials, quota, a request that is refused as such), with the vendor's words."""

    @property
    def most_bytes(self) -> int:
        """Of one batch, as sent."""
        ...

    @property
    def guesses(self) -> bool:
        """Whether a batch that `find` gives may be somebody else's, which only its rows can tell."""
        ...

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:
        """Send the batch; its id at the vendor. After JudgeUnavailableError it may have been made all the same: look with `find`."""
        ...

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        """The id of a batch that was made for this plan though its id was never written down. known: ids that are of other plans."""
        ...

    async def look(self, vendor_id: str) -> Look: ...

    def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        """In any order; some may be missing or come twice."""
        ...

    async def forget(self, vendor_id: str) -> None:
        """The rows are kept here: what the vendor still stores of them may go. Raises nothing."""
        ...

    async def aclose(self) -> None: ...


class BatchGoneError(JudgeError):
    """The vendor does not know a batch that it had taken."""


@contextmanager
def saying(dialect: Dialect, what: str) -> Iterator[None]:
    """Turns whatever the SDK and its transport raise about a batch into our errors, with the vendor's words."""
    where = f"judge {dialect.where} could not {what}"
    try:
        yield
    except dialect.sdk.NotFoundError as error:
        raise BatchGoneError(f"{where}: {words_of(error.body, error.message)}") from error
    except dialect.sdk.APIError as error:
        try:
            outcome = dialect.of_exception(error).outcome
        except JudgeError as fatal:
            raise JudgeError(f"{where}: {fatal}") from error
        words = outcome.detail if isinstance(outcome, Undecided) else ""
        if isinstance(outcome, Undecided) and outcome.reason is not UndecidedReason.UNAVAILABLE:
            raise JudgeError(f"{where}: {words}") from error
        raise JudgeUnavailableError(f"{where}: {words}. {LATER}") from error
    except (httpx2.HTTPError, aiohttp.ClientError, ValueError) as error:  # cut off, or a 200 that is HTML or no JSON
        raise JudgeUnavailableError(f"{where}: {error or type(error).__name__}. {LATER}") from error


def shaped(found: Any, shape: type[Made]) -> Made:
    """The SDK hands a 200 through whatever it holds. Raises ValueError if it is something else, for `saying`."""
    if not isinstance(found, shape):
        raise ValueError(f"the server answered with something else: {str(found)[:80]!r}")
    return found
