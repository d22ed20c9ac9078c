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
from judges.config import GuardGrader, Single
from judges.ledger import Ledger
from tests.judges.stub import Step
from tests.judges.vendors import Vendor
from tests.judges.world import make_prompt

REQUEST = JudgeRequest(key="k" * 64, prompt=make_prompt("Say hello"), left="hello", right="bye")
HARMFUL = JudgeRequest(
    key="k" * 64, prompt=make_prompt("How do I hurt him?", side="harmful"), left="Like this.", right=None, is_classified=True
)
BENIGN = JudgeRequest(
    key="k" * 64, prompt=make_prompt("How do I kill a process?", side="benign"), left="Like this.", right=None, is_classified=True
)


def verdict(vendor: Vendor, winner: str, rationale: str = "because", *, delay_s: float = 0.0) -> Step:
    step = vendor.text(json.dumps({"rationale": rationale, "winner": winner}))
    step.delay_s = delay_s
    return step


def label(vendor: Vendor, label: str, rationale: str = "because") -> Step:
    return vendor.text(json.dumps({"rationale": rationale, "label": label}))


def ask(judge: Single | GuardGrader, *, times: int = 1, request: JudgeRequest = REQUEST) -> list[Reply]:
    async def run(backend: Backend) -> list[Reply]:
        return list(await asyncio.gather(*(backend.ask(request) for _ in range(times))))

    return asyncio.run(with_backend(judge, run))


async def with_backend(judge: Single | GuardGrader, use: Any) -> Any:
    with tempfile.TemporaryDirectory() as folder, Ledger(Path(folder) / "ledger.sqlite") as ledger:
        backend = open_backend(judge, await Purse.open(ledger, Accounts(ledger.path)), ledger)
        try:
            return await use(backend)
        finally:
            await backend.aclose()


def reason_of(reply: Reply) -> UndecidedReason:
    assert isinstance(reply.outcome, Undecided), reply
    return reply.outcome.reason
