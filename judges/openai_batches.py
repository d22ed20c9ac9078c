"""Batches of the OpenAI API and of servers that speak the same: a JSONL file in, an output file and an error file out.

Our plan's id travels as metadata, so a batch whose id was never written down is found by listing. facts/judges.md §4.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Any

import openai
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo_loop.errors import JudgeError, JudgeUnavailableError
from judges.batch_vendor import NEVER_RAN, BatchState, Line, Look, Plan, Row

MOST_ROWS = 50_000
MOST_BYTES = 200_000_000
CALL_TIMEOUT_S = 600.0
"""Of one call; the upload of a full file is the longest."""
CLOCK_SKEW_S = 900
"""How far the vendor's clock may be behind ours: batches made earlier than that before the plan are not ours."""
_PLAN = "dpo_loop_plan"
_WAITING_HELPS = {"token_limit_exceeded", "rate_limit_exceeded", "server_error"}
_QUOTA_CODES = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
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
    """url: `/v1/responses` or `/v1/chat/completions`. api_key_env: named in errors."""

    name = "openai"
    finds_by_guess = False

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str,
        api_key_env: str,
        url: str,
        most_rows: int = MOST_ROWS,
        most_bytes: int = MOST_BYTES,
    ) -> None:
        self._client = openai.AsyncOpenAI(api_key=api_key, base_url=base_url, max_retries=0, timeout=CALL_TIMEOUT_S)
        self._url, self._base_url, self._key, self._key_env = url, base_url, api_key, api_key_env
        self.most_rows, self.most_bytes = most_rows, most_bytes

    async def aclose(self) -> None:
        await self._client.close()

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:
        content = jsonl(lines, self._url)
        try:
            file = await self._client.files.create(file=(f"judge-{plan.id[:12]}.jsonl", content), purpose="batch")
            batch = await self._client.batches.create(
                input_file_id=file.id,
                endpoint=self._url,  # type: ignore[arg-type]  # a Literal of the SDK; one of its values by construction
                completion_window="24h",
                metadata={_PLAN: plan.id},
            )
        except (openai.OpenAIError, ValueError) as error:
            raise self._ours(error, "send a batch") from error
        return batch.id

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:
        try:
            async for batch in self._client.batches.list(limit=100):  # newest first
                if (batch.metadata or {}).get(_PLAN) == plan.id and batch.id not in known:
                    return batch.id
                if batch.created_at < plan.made_at - CLOCK_SKEW_S:
                    return None
        except (openai.OpenAIError, ValueError) as error:
            raise self._ours(error, "list batches") from error
        return None

    async def look(self, batch_id: str) -> Look:
        try:
            batch = await self._client.batches.retrieve(batch_id)
        except (openai.OpenAIError, ValueError) as error:
            raise self._ours(error, f"look at batch {batch_id}") from error
        problems = batch.errors.data if batch.errors and batch.errors.data else []
        words = "; ".join(f"{f'line {p.line}: ' if p.line else ''}{p.message or p.code or 'no reason given'}" for p in problems[:3])
        match batch.status:
            case "completed" | "expired":
                return Look(BatchState.ENDED, words)
            case "cancelled":
                return Look(BatchState.CANCELLED, words)
            case "failed":
                passing = bool(problems) and all(p.code in _WAITING_HELPS for p in problems)
                return Look(BatchState.FAILED, words or "no reason given", may_pass=passing)
            case _:
                return Look(BatchState.RUNNING)

    async def rows(self, batch_id: str) -> AsyncIterator[Row]:
        try:
            batch = await self._client.batches.retrieve(batch_id)
            for file_id in filter(None, (batch.output_file_id, batch.error_file_id)):
                content = (await self._client.files.content(file_id)).content
                for line in content.splitlines():
                    if row := row_of(line):
                        yield row
        except (openai.OpenAIError, ValueError) as error:
            raise self._ours(error, f"read batch {batch_id}") from error

    def _ours(self, error: Exception, what: str) -> JudgeError:
        where = f"judge at {self._base_url} could not {what}"
        if not isinstance(error, openai.APIStatusError):
            return JudgeUnavailableError(f"{where}: {self._clean(f'{error} {error.__cause__}')}")
        words = self._clean(error.message.removeprefix(f"Error code: {error.status_code} - "))
        if _QUOTA_CODES & {error.code, error.type}:
            return JudgeError(f"{where}: the quota is used up: {words}. Raise it, then run the same command again.")
        if error.status_code in (408, 409, 429) or error.status_code >= 500:
            return JudgeUnavailableError(f"{where}: HTTP {error.status_code}: {words}")
        return JudgeError(
            f"{where}: HTTP {error.status_code}: {words}. Check the key in {self._key_env}, and that the server has a batch API; without one "
            "leave out judge.batch."
        )

    def _clean(self, words: str) -> str:
        if len(self._key) >= 8:
            words = words.replace(self._key, "(key)")
        return " ".join(words.split())[:500]


def jsonl(lines: Sequence[Line], url: str) -> bytes:
    """The input file of a batch, one call a line."""
    return b"".join(line_bytes(line.key, line.body, url) for line in lines)


def line_bytes(key: str, body: Mapping[str, Any], url: str) -> bytes:
    return json.dumps({"custom_id": key, "method": "POST", "url": url, "body": body}).encode() + b"\n"


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
    problem = read.response.body if read.response and read.response.body is not None else None
    if problem is None:
        problem = {"error": {"message": read.error}} if isinstance(read.error, str) else {"error": read.error}
    return Row(read.custom_id, status, json.dumps(problem).encode())
