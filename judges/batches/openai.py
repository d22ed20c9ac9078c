"""Batches of the OpenAI API and of servers that speak the same: a JSONL file in, an output file and an error file out.

Our plan's id travels as metadata, so a batch whose id was never written down is found by listing. facts/judges.md §4.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import suppress
from typing import Any

import httpx2
import openai
from openai.types import Batch
from pydantic import BaseModel, ConfigDict, ValidationError

from judges.batches.vendor import CALL_TIMEOUT_S, CLOCK_SKEW_S, NEVER_RAN, BatchState, Line, Look, Plan, Row, saying, shaped
from judges.dialect import Dialect

_PLAN = "dpo_loop_plan"
_WAITING_HELPS = {"token_limit_exceeded", "rate_limit_exceeded", "server_error"}
_NEVER_RAN_CODES = {"batch_expired", "batch_cancelled", "batch_canceled"}


class _Response(BaseModel):
    model_config = ConfigDict(extra="ignore")
    status_code: int
    body: Any = None


class _Line(BaseModel):
    """A line of either file. Servers differ in error: a record at OpenAI, a bare string at `vllm run-batch`."""

    model_config = ConfigDict(extra="ignore")
    custom_id: str
    response: _Response | None = None
    error: dict[str, Any] | str | None = None


class OpenAIBatches:
    most_bytes = 200_000_000
    guesses = False

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._client = dialect.client.with_options(timeout=CALL_TIMEOUT_S)

    async def aclose(self) -> None:
        """The dialect's connections are closed by their owner."""

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:
        name = f"judge-{plan.id[:12]}.jsonl"
        with saying(self._dialect, "take a batch"):
            file = await self._client.files.create(file=(name, jsonl(lines, self._dialect.path)), purpose="batch")
            batch = await self._client.batches.create(
                input_file_id=shaped(file, openai.types.FileObject).id,
                endpoint=self._dialect.path,
                completion_window="24h",
                metadata={_PLAN: plan.id},
            )
            return shaped(batch, Batch).id

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        with saying(self._dialect, "list its batches"):
            async for batch in self._client.batches.list(limit=100):  # newest first
                found = shaped(batch, Batch)
                if (found.metadata or {}).get(_PLAN) == plan.id and found.id not in known:
                    return found.id
                if found.created_at < plan.made_at - CLOCK_SKEW_S:
                    break
        return None

    async def look(self, vendor_id: str) -> Look:
        batch = await self._batch(vendor_id)
        problems = batch.errors.data if batch.errors and batch.errors.data else []
        words = "; ".join(f"{f'line {p.line}: ' if p.line else ''}{p.message or p.code or 'no reason given'}" for p in problems[:3])
        counts = batch.request_counts
        num_rows = counts.completed + counts.failed if counts and counts.total else None
        match batch.status:
            case "completed":
                return Look(BatchState.ENDED, num_rows, words)
            case "expired":
                return Look(BatchState.ENDED, num_rows or 0, words)
            case "cancelled":
                return Look(BatchState.CANCELLED, num_rows or 0, words)
            case "failed":
                passing = bool(problems) and all(p.code in _WAITING_HELPS for p in problems)
                return Look(BatchState.FAILED, 0, words or "no reason given", may_pass=passing)
            case _:
                return Look(BatchState.RUNNING, num_rows)

    async def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        batch = await self._batch(vendor_id)
        for file in filter(None, (batch.output_file_id, batch.error_file_id)):
            with saying(self._dialect, f"hand out the rows of batch {vendor_id}"):
                content = (await self._client.files.content(file)).content
            for line in content.splitlines():
                if row := row_of(line):
                    yield row

    async def forget(self, vendor_id: str) -> None:
        """Prompts and answers are the user's, and nobody reads these files again."""
        with suppress(openai.OpenAIError, httpx2.HTTPError, ValueError, AttributeError):
            batch = await self._client.batches.retrieve(vendor_id)
            for file in filter(None, (batch.input_file_id, batch.output_file_id, batch.error_file_id)):
                await self._client.files.delete(file)

    async def _batch(self, vendor_id: str) -> Batch:
        with saying(self._dialect, f"say how batch {vendor_id} does"):
            return shaped(await self._client.batches.retrieve(vendor_id), Batch)


def jsonl(lines: Sequence[Line], url: str) -> bytes:
    """The input file of a batch, one call a line. url: `/v1/responses` or `/v1/chat/completions`."""
    rows = ({"custom_id": line.id, "method": "POST", "url": url, "body": line.body} for line in lines)
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def row_of(line: bytes) -> Row | None:
    """None for what is no row: a blank or a torn line, a page of HTML. Which call it was of nobody knows."""
    try:
        read = _Line.model_validate(json.loads(line))  # takes half a surrogate pair, which is no reason to lose a paid row
    except (ValidationError, ValueError):
        return None
    if isinstance(read.error, dict) and read.error.get("code") in _NEVER_RAN_CODES:
        return Row(read.custom_id, NEVER_RAN, json.dumps(read.error).encode())
    if read.response is not None and read.response.status_code == 200 and not read.error:
        return Row(read.custom_id, 200, json.dumps(read.response.body).encode())
    status = read.response.status_code if read.response and read.response.status_code >= 400 else 500
    problem = read.response.body if read.response and read.response.body is not None else {"error": read.error}
    return Row(read.custom_id, status, json.dumps(problem).encode())
