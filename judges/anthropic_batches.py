"""Message batches of the Anthropic API. They carry no metadata, so a batch whose id was never written down is guessed and then proved.

A guess is a batch that was made while ours may have been made, holds as many requests, and is of no other plan of ours. Its rows prove
it: their `custom_id`s are our keys, and nobody else's calls have those. A wrong guess costs waiting, never money. facts/judges.md §5.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

import anthropic

from dpo_loop.errors import JudgeError, JudgeUnavailableError
from judges.batch_vendor import NEVER_RAN, BatchState, Line, Look, Plan, Row

MOST_ROWS = 100_000
MOST_BYTES = 256_000_000
CALL_TIMEOUT_S = 600.0
CLOCK_SKEW_S = 900
"""How far the vendor's clock may be from ours."""
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
    """base_url: without `/v1`. api_key_env: named in errors."""

    name = "anthropic"
    finds_by_guess = True

    def __init__(
        self, *, base_url: str, api_key: str, api_key_env: str, most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES
    ) -> None:
        self._client = anthropic.AsyncAnthropic(api_key=api_key, base_url=base_url, max_retries=0, timeout=CALL_TIMEOUT_S)
        self._base_url, self._key, self._key_env = base_url, api_key, api_key_env
        self.most_rows, self.most_bytes = most_rows, most_bytes

    async def aclose(self) -> None:
        await self._client.close()

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:  # noqa: ARG002  # nothing but keys travels
        requests: list[Any] = [{"custom_id": line.key, "params": line.body} for line in lines]
        try:
            batch = await self._client.messages.batches.create(requests=requests)
        except (anthropic.AnthropicError, ValueError) as error:
            raise self._ours(error, "send a batch") from error
        return batch.id

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        guesses: list[str] = []
        try:
            async for batch in self._client.messages.batches.list(limit=100):  # newest first
                if batch.created_at.timestamp() < plan.made_at - CLOCK_SKEW_S:
                    break
                counts = batch.request_counts
                num_rows = counts.processing + counts.succeeded + counts.errored + counts.canceled + counts.expired
                if num_rows == plan.num_rows and batch.id not in known and batch.archived_at is None:
                    guesses.append(batch.id)
        except (anthropic.AnthropicError, ValueError) as error:
            raise self._ours(error, "list batches") from error
        return guesses[-1] if guesses else None  # the oldest: ours was made at once after it was planned

    async def look(self, batch_id: str) -> Look:
        try:
            batch = await self._client.messages.batches.retrieve(batch_id)
        except (anthropic.AnthropicError, ValueError) as error:
            raise self._ours(error, f"look at batch {batch_id}") from error
        if batch.processing_status != "ended":
            return Look(BatchState.RUNNING)
        if batch.cancel_initiated_at is not None and batch.request_counts.canceled > 0:
            return Look(BatchState.CANCELLED, f"cancelled at {batch.cancel_initiated_at:%Y-%m-%d %H:%M}")
        return Look(BatchState.ENDED)

    async def rows(self, batch_id: str) -> AsyncIterator[Row]:
        try:
            async for line in await self._client.messages.batches.results(batch_id):
                match line.result.type:
                    case "succeeded":
                        yield Row(line.custom_id, 200, line.result.message.to_json(indent=None).encode())
                    case "errored":
                        problem = line.result.error
                        status = _STATUS_OF.get(problem.error.type, 500)
                        yield Row(line.custom_id, status, problem.to_json(indent=None).encode())
                    case _:
                        yield Row(line.custom_id, NEVER_RAN, json.dumps({"type": line.result.type}).encode())
        except (anthropic.AnthropicError, ValueError, AttributeError) as error:  # AttributeError: a row of another shape
            raise self._ours(error, f"read batch {batch_id}") from error

    def _ours(self, error: Exception, what: str) -> JudgeError:
        where = f"judge at {self._base_url} could not {what}"
        if not isinstance(error, anthropic.APIStatusError):
            return JudgeUnavailableError(f"{where}: {self._clean(f'{error} {error.__cause__}')}")
        words = self._clean(error.message.removeprefix(f"Error code: {error.status_code} - "))
        spent = isinstance(error, anthropic.RateLimitError) and getattr(error, "error_code", None) is not None
        if not spent and (error.status_code in (408, 409, 429) or error.status_code >= 500):
            return JudgeUnavailableError(f"{where}: HTTP {error.status_code}: {words}")
        return JudgeError(
            f"{where}: HTTP {error.status_code}: {words}. Check the key in {self._key_env}, the account's billing, and that the server has a "
            "batch API; without one leave out judge.batch."
        )

    def _clean(self, words: str) -> str:
        if len(self._key) >= 8:
            words = words.replace(self._key, "(key)")
        return " ".join(words.split())[:500]
