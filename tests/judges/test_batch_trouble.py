"""What goes wrong between two processes, two batches, or a process and its vendor: nothing is paid twice, and every stop has a way out."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import BudgetExceededError, InputError, JudgeError, JudgeUnavailableError
from dpo_loop.types import Undecided, UndecidedReason
from judges.accounts import Accounts, BudgetConfig
from judges.asker import Candidate
from judges.batches.openai import jsonl
from judges.batches.sender import LINE_BYTES
from judges.batches.vendor import Line
from judges.config import ApiBatch, RemoteJudge
from judges.direct import num_bytes
from judges.jury import open_jury
from tests.judges.batch_server import JUDGES, BatchServer
from tests.judges.stub import Step
from tests.judges.test_batches import ONE_CALL, PROMPTS, RIGHT, judged, longest, priced, shown
from tests.judges.vendors import VENDORS

LOOKS = r"GET .*/batches/batch_[0-9]+"
X, Y = Candidate("x", "xx"), Candidate("y", "y")


@pytest.fixture(params=list(JUDGES))
def server(request: pytest.FixtureRequest) -> Iterator[BatchServer]:
    with BatchServer(request.param, longest(request.param)) as running:
        yield running


def interrupted(folder: Path, server: BatchServer, judge: RemoteJudge, *faults: str | int, at: str = "POST .*batches$") -> None:
    """A process that ends in the middle: what it had sent goes on."""
    server.fails_at, server.faults = re.compile(at), [*faults]
    with pytest.raises(JudgeUnavailableError):
        judged(folder, judge.model_copy(update={"outage_s": 0.0}))
    server.faults = []


def with_batch(judge: RemoteJudge, **settings: Any) -> RemoteJudge:
    assert judge.batch is not None
    return judge.model_copy(update={"batch": judge.batch.model_copy(update=settings)})


# ---------------------------------------------------------------------------------------------------------------- hand over


def test_hand_overs_of_equal_batches_that_were_all_cut_short_are_told_apart(tmp_path: Path, server: BatchServer) -> None:
    interrupted(tmp_path, server, server.judge(max_calls=6), *["drop"] * 4)
    assert len(server.batches) >= 1
    assert judged(tmp_path, server.judge(max_calls=6))[0] == RIGHT
    assert set(server.times_sent.values()) == {1}


def test_several_hand_overs_of_one_process_are_cut_short(tmp_path: Path, server: BatchServer) -> None:
    server.faults = ["drop", "", "drop", "drop", ""]
    assert judged(tmp_path, server.judge(max_calls=6))[0] == RIGHT
    assert set(server.times_sent.values()) == {1}


@pytest.mark.parametrize("fault", ["drop", 503])
def test_a_batch_of_somebody_else_that_looks_like_ours_is_left_alone(tmp_path: Path, fault: str | int) -> None:
    with BatchServer("anthropic", longest("anthropic")) as server:
        body = {"messages": [{"role": "user", "content": '<<<ANSWER\n"a"\n<<<ANSWER\n"b"'}]}
        server.create({f"other-{n}": body for n in range(24)}, {})
        server.faults = [fault]
        assert judged(tmp_path, server.judge())[0] == RIGHT
        assert len(server.batches) == 5
        assert set(server.times_sent.values()) == {1}


def test_a_batch_that_appears_late_in_the_vendors_list_is_waited_for(tmp_path: Path, server: BatchServer) -> None:
    interrupted(tmp_path, server, server.judge(), "drop")
    time.sleep(0.4)  # the plan is older than hand_over_s by now
    server.is_hidden = 3
    assert judged(tmp_path, server.judge(hand_over_s=0.3))[0] == RIGHT
    assert set(server.times_sent.values()) == {1}


# -------------------------------------------------------------------------------------------------------- several processes


def test_two_processes_that_wait_for_one_batch_count_its_money_once(tmp_path: Path, server: BatchServer) -> None:
    judge, budget = priced(tmp_path, server)
    accounts = Accounts(tmp_path / "ledger.sqlite", budget)
    keys = [(prompt, *pair) for prompt in PROMPTS[:4] for pair in ((X, Y), (Y, X))]

    async def ask(some: list[Any]) -> dict[str, Any]:
        async with open_jury(judge, accounts) as jury:
            await asyncio.gather(*(jury.ask(prompt, left, right) for prompt, left, right in some))
            return jury.figures()["budget"]["run"]

    async def both() -> dict[str, Any]:
        await asyncio.gather(ask(keys[:4]), ask(keys[4:]))
        return await ask([])

    server.fails_at, server.faults = re.compile(LOOKS), [503] * 100
    stopped = judge.model_copy(update={"outage_s": 0.0})
    judge, resumed = stopped, judge
    with pytest.raises(JudgeUnavailableError):
        asyncio.run(ask(keys))
    server.faults, judge = [], resumed
    run = asyncio.run(both())
    assert set(server.times_sent.values()) == {1}
    assert run == {
        "spent_usd": pytest.approx(8 * ONE_CALL),
        "under_way_usd": 0.0,
        "never_settled_usd": 0.0,
        "calls": 8,
    }


def test_asking_directly_while_a_batch_is_open_is_refused_until_it_is_given_up(tmp_path: Path, server: BatchServer) -> None:
    judge, budget = priced(tmp_path, server)
    server.fails_at, server.faults = re.compile(LOOKS), [503] * 100
    with pytest.raises(JudgeUnavailableError):
        judged(tmp_path, judge.model_copy(update={"outage_s": 0.0}), budget)
    server.faults = []
    direct = judge.model_copy(update={"batch": None})
    with pytest.raises(InputError, match=r"under way \(batch_0000\).*give_up"):
        judged(tmp_path, direct, budget)
    labels, figures = judged(tmp_path, with_batch(judge, give_up=("batch_0000",)), budget)
    assert labels == RIGHT
    assert max(server.times_sent.values()) == 2, "that is what giving up means"
    assert figures["budget"]["run"]["never_settled_usd"] > 0
    assert judged(tmp_path, direct, budget)[0] == RIGHT


def test_a_batch_that_the_vendor_forgot_is_told_with_the_way_out(tmp_path: Path, server: BatchServer) -> None:
    interrupted(tmp_path, server, server.judge(), *[503] * 100, at=LOOKS)
    server.batches.clear()
    for _ in range(2):
        with pytest.raises(JudgeError, match=r"no such batch.*key may be another project's.*give_up=\[.batch_0000.\]"):
            judged(tmp_path, server.judge())
    assert judged(tmp_path, with_batch(server.judge(), give_up=("batch_0000",)))[0] == RIGHT


# ------------------------------------------------------------------------------------------------------------ rows and errors


def test_a_row_that_says_that_no_call_can_succeed_is_not_heard_again(tmp_path: Path, server: BatchServer) -> None:
    vendor, right = VENDORS[server.kind], server.answer
    code = "rate_limit_error" if server.kind == "anthropic" else "insufficient_quota"
    said = [vendor.error(429, "insufficient_quota: pay first", code)]
    server.answer = lambda line, body: said.pop() if said else right(line, body)
    with pytest.raises(JudgeError, match="quota is used up"):
        judged(tmp_path, server.judge())
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert set(server.billed.values()) == {1}


def test_rows_of_a_rate_limit_are_asked_again_and_not_for_ever(tmp_path: Path, server: BatchServer) -> None:
    vendor = VENDORS[server.kind]
    server.answer = lambda line, body: vendor.error(429, "slow down", "rate_limit_error")
    labels, figures = judged(tmp_path, server.judge(max_attempts=3))
    assert labels == [("", "")] * len(PROMPTS)
    assert figures["undecided_calls"].keys() == {"unavailable"}
    assert max(server.times_sent.values()) <= 2, "of an undecided match that is also the last pair"


def test_half_a_character_in_a_reply_is_malformed_and_no_reason_to_pay_again(tmp_path: Path, server: BatchServer) -> None:
    vendor = VENDORS[server.kind]
    broken = vendor.text("\ud83d no verdict")
    server.answer = lambda line, body: Step(body=broken.body)

    async def main() -> Any:
        async with open_jury(server.judge(), Accounts(tmp_path / "ledger.sqlite")) as jury:
            return await jury.ask(PROMPTS[0], X, Y)

    ballot = asyncio.run(main())
    assert isinstance(ballot.outcome, Undecided)
    assert (ballot.outcome.reason, ballot.attempts) == (UndecidedReason.MALFORMED, 2)
    assert set(server.times_sent.values()) == {1}


def test_half_a_character_in_an_answer_reaches_the_judge_as_an_escape(tmp_path: Path, server: BatchServer) -> None:
    seen: list[tuple[str, ...]] = []
    right = server.answer

    def answer(line: str, body: dict[str, Any]) -> Step | None:
        seen.append(tuple(shown(body)))
        return right(line, body)

    server.answer = answer

    async def main() -> Any:
        async with open_jury(server.judge(), Accounts(tmp_path / "ledger.sqlite")) as jury:
            return await jury.ask(PROMPTS[0], Candidate("x", "half \ud83d"), Y)

    assert asyncio.run(main()).outcome.kind == "decided"
    assert seen == [("half \ud83d", "y")]


def test_a_batch_that_cannot_be_planned_is_an_error_and_no_wait(tmp_path: Path, server: BatchServer) -> None:
    async def main() -> None:
        async with asyncio.timeout(10), open_jury(server.judge(), Accounts(tmp_path / "ledger.sqlite")) as jury:
            asked = asyncio.create_task(jury.ask(PROMPTS[0], X, Y))
            await asyncio.sleep(0.02)  # gathered, not yet planned
            with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
                db.execute("DROP TABLE batches")
            await asked

    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        asyncio.run(main())


def test_an_outage_under_a_cap_ends_the_stage(tmp_path: Path, server: BatchServer) -> None:
    """A second batch waits for room while the first is under way: when that one fails, the wait ends too."""
    server.fails_at, server.faults = re.compile(LOOKS), [503] * 1_000
    judge = server.judge(max_calls=5, outage_s=0.3)

    async def main() -> None:
        budget = BudgetConfig(calls_per_run=7)
        async with asyncio.timeout(20), open_jury(judge, Accounts(tmp_path / "ledger.sqlite", budget)) as jury:
            await asyncio.gather(*(jury.ask(prompt, X, Y) for prompt in PROMPTS))

    with pytest.raises((JudgeUnavailableError, BudgetExceededError)):
        asyncio.run(main())


# ------------------------------------------------------------------------------------------------------------------ OpenAI


def test_a_full_queue_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    with BatchServer("openai", longest("openai")) as server:
        server.refusals = ["token_limit_exceeded"]
        assert judged(tmp_path, server.judge())[0] == RIGHT
        assert len(server.batches) == 5
        server.refusals = ["token_limit_exceeded"] * 1_000
        other = with_batch(server.judge(model="other"), queue_s=0.2)
        with pytest.raises(
            JudgeError, match=r"has taken no batch for 0\.2 s: refused: token_limit_exceeded\. Lower judge\.batch\.max_calls"
        ):
            judged(tmp_path, other)


def test_a_bad_file_is_told_and_files_of_a_read_batch_are_deleted(tmp_path: Path) -> None:
    with BatchServer("openai", longest("openai")) as server:
        server.refusals = ["invalid_json_line"]
        with pytest.raises(JudgeError, match="refused as a whole: refused: invalid_json_line"):
            judged(tmp_path, server.judge())
        judged(tmp_path, server.judge())
        assert len([name for name in server.deleted if name.endswith("-out")]) == 4


def test_a_batch_is_as_large_as_it_was_reckoned() -> None:
    """Other scripts take several bytes a letter, and no escapes that would double them."""
    body = {"model": "judge", "input": "Привет, как дела? 你好 🙂 " * 50}
    line = Line("0" * 64, "0" * 64, body, 10)
    assert num_bytes(body) < len(jsonl([line], "/v1/responses")) <= num_bytes(body) + LINE_BYTES
    assert json.loads(jsonl([line], "/v1/responses"))["body"] == body
    assert ApiBatch().max_calls <= 50_000
