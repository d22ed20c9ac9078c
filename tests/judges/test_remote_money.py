"""What a call costs in the end: paid what was used, kept what may have been billed, given back what was refused."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import BudgetExceededError, InputError, JudgeError
from dpo_loop.types import Decided
from judges.accounts import Accounts, BudgetConfig
from judges.backend import Reply, open_backend
from judges.budget import Purse
from judges.config import OpenAICompatibleJudge
from judges.ledger import Ledger
from tests.judges.asking import REQUEST
from tests.judges.stub import Step, Stub, chat, fails, says

ONE_CALL = (60 * 2.0 + 40 * 0.5 + 7 * 8.0) / 1e6
"""Dollars for the usage that the stub states: 100 tokens in, 40 of them cached, 7 out."""


def spend(folder: Path, judge: OpenAICompatibleJudge, *, calls: int = 1, **caps: Any) -> tuple[list[Reply], dict[str, Any]]:
    (folder / "prices.yaml").write_text("as_of: 2026-11-24\nmodels:\n  judge: {input: 2.0, cached_input: 0.5, output: 8.0}\n")
    accounts = Accounts(folder / "ledger.sqlite", BudgetConfig(prices=str(folder / "prices.yaml"), **caps), 0)

    async def run() -> tuple[list[Reply], dict[str, Any]]:
        with Ledger(accounts.ledger) as ledger:
            purse = await Purse.open(ledger, accounts)
            backend = open_backend(judge, purse, ledger)
            try:
                replies = [await backend.ask(REQUEST) for _ in range(calls)]
            finally:
                await backend.aclose()
            return replies, purse.figures()["run"]

    return asyncio.run(run())


def test_a_call_costs_what_it_used(tmp_path: Path, stub: Stub) -> None:
    [reply], run = spend(tmp_path, stub.judge(free=False))
    assert reply.cost_usd == pytest.approx(ONE_CALL)
    assert run == {"spent_usd": pytest.approx(ONE_CALL), "under_way_usd": 0.0, "never_settled_usd": 0.0, "calls": 1}


@pytest.mark.parametrize(
    "failure", [fails(500, "boom"), fails(429, "slow down"), fails(529, "overloaded")], ids=["500", "429", "529"]
)
def test_an_attempt_that_was_refused_costs_nothing(tmp_path: Path, stub: Stub, failure: Step) -> None:
    stub.script = [failure]
    [reply], run = spend(tmp_path, stub.judge(free=False))
    assert (reply.attempts, reply.cost_usd) == (2, pytest.approx(ONE_CALL))
    assert (run["spent_usd"], run["never_settled_usd"], run["calls"]) == (pytest.approx(ONE_CALL), 0.0, 1)


def test_every_answered_attempt_is_paid_readable_or_not(tmp_path: Path, stub: Stub) -> None:
    stub.script = [chat("no verdict"), says("A")]
    [reply], run = spend(tmp_path, stub.judge(free=False))
    assert reply.cost_usd == run["spent_usd"] == pytest.approx(2 * ONE_CALL)


@pytest.mark.parametrize(
    "lost",
    [
        says("A", delay_s=30),
        Step(drop=True),
        Step(body=b"<html>"),
        Step(body=b'{"choices": []}'),
        fails(504, "gateway time-out"),
        fails(408, "request time-out"),
    ],
    ids=["hang", "drop", "html", "no usage", "504", "408"],
)
def test_what_may_have_been_billed_stays_set_aside(tmp_path: Path, stub: Stub, lost: Step) -> None:
    stub.script = [lost]
    [reply], run = spend(tmp_path, stub.judge(free=False, attempt_timeout_s=0.5))
    assert reply.cost_usd == run["spent_usd"] == pytest.approx(ONE_CALL)
    assert run["never_settled_usd"] > ONE_CALL
    assert (run["under_way_usd"], run["calls"]) == (0.0, 2)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        {"prompt_tokens": 10, "completion_tokens": 7, "prompt_tokens_details": {"cached_tokens": 100_000}},
        {"prompt_tokens": -5, "completion_tokens": 7},
        {"prompt_tokens": 10**30, "completion_tokens": 7},
    ],
    ids=["none", "empty", "more cached than read", "negative", "absurd"],
)
def test_usage_that_cannot_be_true_bills_nothing_and_gives_nothing_back(
    tmp_path: Path, stub: Stub, usage: dict[str, Any] | None
) -> None:
    body = json.loads(says("A").body) | {"usage": usage}
    stub.script = [Step(body=json.dumps(body).encode())]
    [reply], run = spend(tmp_path, stub.judge(free=False))
    assert isinstance(reply.outcome, Decided), "the verdict is whole"
    assert (run["spent_usd"], run["under_way_usd"], run["calls"]) == (0.0, 0.0, 1)
    assert run["never_settled_usd"] > ONE_CALL


def test_a_server_that_was_never_reached_costs_nothing(tmp_path: Path, stub: Stub) -> None:
    judge = stub.judge(free=False, base_url="http://127.0.0.1:9/v1", max_attempts=2)
    [reply], run = spend(tmp_path, judge)
    assert (reply.attempts, reply.cost_usd) == (2, 0.0)
    assert run == {"spent_usd": 0.0, "under_way_usd": 0.0, "never_settled_usd": 0.0, "calls": 0}


def test_the_call_that_would_go_over_a_cap_is_not_sent_and_goes_when_the_cap_is_raised(tmp_path: Path, stub: Stub) -> None:
    with pytest.raises(BudgetExceededError, match=r"budget\.calls_per_run: 2 calls"):
        spend(tmp_path, stub.judge(free=True), calls=3, calls_per_run=2)
    assert len(stub.seen) == 2
    spend(tmp_path, stub.judge(free=True), calls_per_run=3)
    with pytest.raises(BudgetExceededError, match=r"budget\.usd_per_run"):
        spend(tmp_path, stub.judge(free=False), usd_per_run=ONE_CALL)
    assert len(stub.seen) == 3


def test_a_fatal_error_gives_back_what_was_set_aside(tmp_path: Path, stub: Stub) -> None:
    stub.script = [fails(401, "wrong key")]
    with pytest.raises(JudgeError):
        spend(tmp_path, stub.judge(free=False))
    _, run = spend(tmp_path, stub.judge(free=False))
    assert (run["calls"], run["never_settled_usd"]) == (1, 0.0)


def test_a_model_without_a_price_is_refused_before_anything_is_asked(tmp_path: Path, stub: Stub) -> None:
    with pytest.raises(InputError, match="free: true"):
        spend(tmp_path, stub.judge(free=False, model="unheard-of"))
    assert not stub.seen
