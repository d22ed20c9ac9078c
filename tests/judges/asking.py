"""Asking a remote judge of any vendor: what the tests of remote judges share. `vendor` is a fixture of conftest.py."""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

from dpo_loop.types import Undecided, UndecidedReason
from judges.accounts import Accounts
from judges.backend import Backend, JudgeRequest, Reply, open_backend
from judges.budget import Purse
from judges.config import RemoteJudge
from judges.ledger import Ledger
from tests.judges.stub import Step
from tests.judges.vendors import Vendor
from tests.judges.world import make_prompt

REQUEST = JudgeRequest(key="k" * 64, prompt=make_prompt("Say hello"), left="hello", right="bye")


def verdict(vendor: Vendor, winner: str, rationale: str = "because", *, delay_s: float = 0.0) -> Step:
    step = vendor.text(json.dumps({"rationale": rationale, "winner": winner}))
    step.delay_s = delay_s
    return step


def ask(judge: RemoteJudge, *, times: int = 1) -> list[Reply]:
    async def run(backend: Backend) -> list[Reply]:
        return list(await asyncio.gather(*(backend.ask(REQUEST) for _ in range(times))))

    return asyncio.run(with_backend(judge, run))


async def with_backend(judge: RemoteJudge, use: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        backend = open_backend(judge, await Purse.open(ledger, Accounts(ledger.path)), ledger)
        try:
            return await use(backend)
        finally:
            await backend.aclose()


def reason_of(reply: Reply) -> UndecidedReason:
    assert isinstance(reply.outcome, Undecided), reply
    return reply.outcome.reason
