"""`vllm run-batch` on this machine: the same lines as for OpenAI's chat completions, a file in, a file out, no server.

One engine at a time, a child that ends with this process; a batch that was cut short is run anew, since nothing was paid for it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from dpo_loop.errors import JudgeError, StorageError
from judges.batches.openai import jsonl, row_of
from judges.batches.vendor import BatchState, Line, Look, Plan, Row
from judges.config import VllmRunBatchJudge

CHAT = "/v1/chat/completions"
"""The only generating endpoint that run-batch knows."""
GRACE_S = 10.0
_PR_SET_PDEATHSIG = 1
_engine: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()
"""Whoever holds it may start one: two would not fit one GPU."""


class RunBatch:
    """Files and logs lie beside the ledger, in `<ledger>.batches`; the logs stay."""

    most_bytes = 1_000_000_000
    guesses = False

    def __init__(self, config: VllmRunBatchJudge, ledger: Path) -> None:
        self._config = config
        self._folder = ledger.with_name(f"{ledger.name}.batches")
        self._children: dict[str, asyncio.subprocess.Process] = {}
        self._turn = _engine.setdefault(asyncio.get_running_loop(), asyncio.Lock())
        self._has_turn: str | None = None

    async def aclose(self) -> None:
        for child in self._children.values():
            if child.returncode is None:
                child.terminate()
                try:
                    await asyncio.wait_for(child.wait(), GRACE_S)
                except TimeoutError:
                    child.kill()
                    await child.wait()
        self._give_up_turn(self._has_turn)

    async def create(self, plan: Plan, lines: Sequence[Line]) -> str:
        await self._turn.acquire()
        self._has_turn = plan.id
        try:
            self._children[plan.id] = await self._start(plan, lines)
        except OSError as error:
            self._give_up_turn(plan.id)
            raise StorageError(
                f"cannot write the batch of the judge to {self._folder}: {error}. Free space or mend the permissions, then run the same command again."
            ) from error
        return plan.id

    async def _start(self, plan: Plan, lines: Sequence[Line]) -> asyncio.subprocess.Process:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file(plan.id, "in.jsonl").write_bytes(jsonl(lines, CHAT))
        command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
        files = ["-i", str(self._file(plan.id, "in.jsonl")), "-o", str(self._file(plan.id, "part.jsonl"))]
        model = ["--model", self._config.weights, "--served-model-name", self._config.model, *self._config.args]
        with self._file(plan.id, "log").open("ab") as log:
            return await asyncio.create_subprocess_exec(
                *command, *files, *model, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_end_with(os.getpid())
            )

    def _give_up_turn(self, plan: str | None) -> None:
        if plan is not None and self._has_turn == plan:
            self._has_turn = None
            self._turn.release()

    async def find(self, plan: Plan, known: Collection[str]) -> str | None:  # noqa: ARG002 - a plan is its own id here
        return plan.id if self._file(plan.id, "out.jsonl").is_file() else None

    async def look(self, vendor_id: str) -> Look:
        out, part, child = self._file(vendor_id, "out.jsonl"), self._file(vendor_id, "part.jsonl"), self._children.get(vendor_id)
        if child is not None and child.returncode is None:
            return Look(BatchState.RUNNING, 0)
        self._give_up_turn(vendor_id)
        if out.is_file():
            return Look(BatchState.ENDED)
        if child is None:
            return Look(BatchState.FAILED, 0, "the process that ran it is gone", may_pass=True)
        if child.returncode == 0 and part.is_file():
            part.replace(out)
            return Look(BatchState.ENDED)
        log = self._file(vendor_id, "log")
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return Look(BatchState.FAILED, 0, f"vllm run-batch ended with {child.returncode}: {' '.join(last)} (all of it in {log})")

    async def rows(self, vendor_id: str) -> AsyncIterator[Row]:
        try:
            content = self._file(vendor_id, "out.jsonl").read_bytes()
        except OSError as error:
            raise JudgeError(f"the rows of batch {vendor_id[:12]} cannot be read: {error}. Run the same command again.") from error
        for line in content.splitlines():
            if row := row_of(line):
                yield row

    async def forget(self, vendor_id: str) -> None:
        for kind in ("in.jsonl", "out.jsonl"):
            self._file(vendor_id, kind).unlink(missing_ok=True)

    def _file(self, plan: str, kind: str) -> Path:
        return self._folder / f"{plan[:16]}.{kind}"


def _end_with(parent: int) -> Callable[[], None]:
    """To be called in the child before its program starts: the kernel ends it when this process dies, which frees its GPU."""
    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return prepare
