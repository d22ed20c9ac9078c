"""Message batches of the Anthropic API. They carry no metadata, so a batch whose id was never written down is guessed and then proved.

A guess is a batch that was made while ours may have been made, holds as many requests, and is of no other plan of ours. Its rows prove
it: their `custom_id`s are our lines, and nobody else's calls have those. A wrong guess costs waiting. facts/judges.md §5.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterable, AsyncIterator, Collection, Sequence
from typing import Any

from anthropic.types.messages import MessageBatch, MessageBatchIndividualResponse

from judges.batches.vendor import CALL_TIMEOUT_S, CLOCK_SKEW_S, NEVER_RAN, BatchState, Line, Look, Plan, Row, saying, shaped
from judges.dialect import Dialect

_STATUS_OF = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}


class AnthropicBatches:
    most_bytes = 256_000_000
    guesses = True

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._batches = dialect.client.with_options(timeout=CALL_TIMEOUT_S).messages.batches

    async def aclose(self) -> None:
        """The dialect's connections are closed by their owner."""

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:  # noqa: ARG002 - nothing but the lines travels
        with saying(self._dialect, "take a batch"):
            batch = await self._batches.create(requests=[{"custom_id": line.id, "params": line.body} for line in lines])
            return shaped(batch, MessageBatch).id

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        guesses: list[str] = []
        with saying(self._dialect, "list its batches"):
            async for batch in self._batches.list(limit=100):  # newest first
                found = shaped(batch, MessageBatch)
                if found.created_at.timestamp() < plan.made_at - CLOCK_SKEW_S:
                    break
                if _num_lines(found) == plan.num_lines and found.id not in known and found.archived_at is None:
                    guesses.append(found.id)
        return guesses[-1] if guesses else None  # the oldest: ours was made at once after it was planned

    async def look(self, vendor_id: str) -> Look:
        with saying(self._dialect, f"say how batch {vendor_id} does"):
            batch = shaped(await self._batches.retrieve(vendor_id), MessageBatch)
        if batch.processing_status != "ended":
            return Look(BatchState.RUNNING, batch.request_counts.succeeded + batch.request_counts.errored)
        if batch.cancel_initiated_at is not None and batch.request_counts.canceled > 0:
            when = f"cancelled at {batch.cancel_initiated_at:%Y-%m-%d %H:%M}"
            return Look(BatchState.CANCELLED, _num_lines(batch), when)
        return Look(BatchState.ENDED, _num_lines(batch))

    async def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        with saying(self._dialect, f"hand out the rows of batch {vendor_id}"):
            results: Any = await self._batches.results(vendor_id)
            async for line in shaped(results, AsyncIterable):  # type: ignore[type-abstract]
                yield _row(line)

    async def forget(self, vendor_id: str) -> None:
        """Results are gone by themselves after a month; a batch that was deleted could not be told from one that was never made."""


def _num_lines(batch: MessageBatch) -> int:
    counts = batch.request_counts
    return counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired


def _row(line: MessageBatchIndividualResponse) -> Row:
    """What has another shape is an error of that row: it may have been paid, and it is not read as anything."""
    told = line.to_dict(mode="json", warnings=False)
    result = told.get("result")
    result = result if isinstance(result, dict) else {}
    match result.get("type"):
        case "succeeded":
            return Row(str(line.custom_id), 200, json.dumps(result.get("message")).encode())
        case "expired" | "canceled":
            return Row(str(line.custom_id), NEVER_RAN, json.dumps(result).encode())
        case _:
            problem = result.get("error") or {}
            said = problem.get("error") or {} if isinstance(problem, dict) else {}
            status = _STATUS_OF.get(said.get("type", ""), 500) if isinstance(said, dict) else 500
            return Row(str(line.custom_id), status, json.dumps(problem).encode())
