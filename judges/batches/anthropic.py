"""Message batches of the Anthropic API. They carry no metadata, so a batch whose id was never written down is guessed and then proved.

A guess is a batch that was made while ours may have been made, holds as many requests, and is of no other plan of ours. Its rows prove
it: their `custom_id`s are our lines, and nobody else's calls have those. A wrong guess costs waiting, never money. facts/judges.md §5.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence

from judges.batches.vendor import CALL_TIMEOUT_S, CLOCK_SKEW_S, NEVER_RAN, BatchState, Line, Look, Plan, Row, saying
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
            return str(batch.id)

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        guesses: list[str] = []
        with saying(self._dialect, "list its batches"):
            async for batch in self._batches.list(limit=100):  # newest first
                if batch.created_at.timestamp() < plan.made_at - CLOCK_SKEW_S:
                    break
                counts = batch.request_counts
                num_lines = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                if num_lines == plan.num_lines and batch.id not in known and batch.archived_at is None:
                    guesses.append(batch.id)
        return guesses[-1] if guesses else None  # the oldest: ours was made at once after it was planned

    async def look(self, vendor_id: str) -> Look:
        with saying(self._dialect, f"say how batch {vendor_id} does"):
            batch = await self._batches.retrieve(vendor_id)
            counts = batch.request_counts
            num_done = counts.succeeded + counts.errored
            if batch.processing_status != "ended":
                return Look(BatchState.RUNNING, num_done)
            if batch.cancel_initiated_at is not None and counts.canceled > 0:
                return Look(BatchState.CANCELLED, num_done, f"cancelled at {batch.cancel_initiated_at:%Y-%m-%d %H:%M}")
            return Look(BatchState.ENDED, num_done)

    async def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        with saying(self._dialect, f"hand out the rows of batch {vendor_id}"):
            results = await self._batches.results(vendor_id)
            async for line in results:
                match line.result.type:
                    case "succeeded":
                        row = Row(
                            line.custom_id, 200, json.dumps(line.result.message.to_dict(mode="json", warnings=False)).encode()
                        )
                    case "errored":
                        status = _STATUS_OF.get(line.result.error.error.type, 500)
                        row = Row(
                            line.custom_id, status, json.dumps(line.result.error.to_dict(mode="json", warnings=False)).encode()
                        )
                    case _:
                        row = Row(line.custom_id, NEVER_RAN, json.dumps({"type": line.result.type}).encode())
                yield row
