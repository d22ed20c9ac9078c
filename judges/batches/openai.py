"""Batches of the OpenAI API and of servers that speak the same: a JSONL file in, an output file and an error file out.

Our plan's id travels as metadata, so a batch whose id was never written down is found by listing. facts/judges.md §4.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from judges.batches.vendor import CALL_TIMEOUT_S, CLOCK_SKEW_S, NEVER_RAN, BatchState, Line, Look, Plan, Row, saying
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
        with saying(self._dialect, "take a batch"):
            file = await self._client.files.create(
                file=(f"judge-{plan.id[:12]}.jsonl", jsonl(lines, self._dialect.path)), purpose="batch"
            )
            batch = await self._client.batches.create(
                input_file_id=file.id, endpoint=self._dialect.path, completion_window="24h", metadata={_PLAN: plan.id}
            )
            return str(batch.id)

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        with saying(self._dialect, "list its batches"):
            async for batch in self._client.batches.list(limit=100):  # newest first
                if (batch.metadata or {}).get(_PLAN) == plan.id and batch.id not in known:
                    return str(batch.id)
                if batch.created_at < plan.made_at - CLOCK_SKEW_S:
                    break
        return None

    async def look(self, vendor_id: str) -> Look:
        with saying(self._dialect, f"say how batch {vendor_id} does"):
            batch = await self._client.batches.retrieve(vendor_id)
            problems = batch.errors.data if batch.errors and batch.errors.data else []
            words = "; ".join(
                f"{f'line {p.line}: ' if p.line else ''}{p.message or p.code or 'no reason given'}" for p in problems[:3]
            )
            counts = batch.request_counts
            num_done = counts.completed + counts.failed if counts else 0
            match batch.status:
                case "completed" | "expired":
                    return Look(BatchState.ENDED, num_done, words)
                case "cancelled":
                    return Look(BatchState.CANCELLED, num_done, words)
                case "failed":
                    passing = bool(problems) and all(p.code in _WAITING_HELPS for p in problems)
                    return Look(BatchState.FAILED, num_done, words or "no reason given", may_pass=passing)
                case str():
                    return Look(BatchState.RUNNING, num_done)
                case other:
                    raise ValueError(f"a batch of status {other!r}")

    async def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        with saying(self._dialect, f"hand out the rows of batch {vendor_id}"):
            batch = await self._client.batches.retrieve(vendor_id)
            files = [
                (await self._client.files.content(file)).content for file in (batch.output_file_id, batch.error_file_id) if file
            ]
        for content in files:
            for line in content.splitlines():
                if row := row_of(line):
                    yield row


def jsonl(lines: Sequence[Line], url: str) -> bytes:
    """The input file of a batch, one call a line. url: `/v1/responses` or `/v1/chat/completions`."""
    rows = ({"custom_id": line.id, "method": "POST", "url": url, "body": line.body} for line in lines)
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def row_of(line: bytes) -> Row | None:
    """None for what is no row: a blank or a torn line. Its call then has no row, which is not an answer."""
    try:
        read = _Line.model_validate_json(line)
    except ValidationError:
        return None
    if isinstance(read.error, dict) and read.error.get("code") in _NEVER_RAN_CODES:
        return Row(read.custom_id, NEVER_RAN, json.dumps(read.error).encode())
    if read.response is not None and read.response.status_code == 200 and not read.error:
        return Row(read.custom_id, 200, json.dumps(read.response.body).encode())
    status = read.response.status_code if read.response and read.response.status_code >= 400 else 500
    problem = read.response.body if read.response and read.response.body is not None else {"error": read.error}
    return Row(read.custom_id, status, json.dumps(problem).encode())
