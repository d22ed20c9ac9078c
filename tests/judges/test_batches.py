"""Batches over real sockets, for every vendor: no call is lost, none is paid twice, and no failure becomes a label."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import BudgetExceededError, JudgeError, JudgeUnavailableError
from dpo_loop.types import Decided, Undecided, UndecidedReason
from judges.accounts import Accounts, BudgetConfig
from judges.asker import Candidate
from judges.config import ApiBatch, RemoteJudge
from judges.jury import open_jury
from judges.ledger import Ledger
from judges.stage import judge_prompts
from tests.judges.batch_server import JUDGES, BatchServer, shuffled
from tests.judges.stub import Step
from tests.judges.vendors import VENDORS
from tests.judges.world import make_prompt

PROMPTS = [make_prompt(f"Question {number}") for number in range(12)]
ANSWERS = {prompt.id: [Candidate(f"{prompt.id}/{text}", text) for text in ("a", "bb", "ccc", "dddd")] for prompt in PROMPTS}


def longest(kind: str) -> Callable[[str, dict[str, Any]], Step]:
    """A judge that prefers the longer answer, and so has one right order of the four."""

    def answer(line: str, body: dict[str, Any]) -> Step:
        sizes = [len(text) for text in shown(body)]
        return VENDORS[kind].text(json.dumps({"rationale": "", "winner": "A" if sizes[0] > sizes[1] else "B"}))

    return answer


def shown(body: dict[str, Any]) -> list[str]:
    """The two answers in a request, of whatever vendor."""
    text = body["input"] if "input" in body else next(m["content"] for m in body["messages"] if m["role"] == "user")
    lines = text.splitlines()
    return [json.loads(lines[at + 1]) for at, line in enumerate(lines) if line.startswith("<<<ANSWER")]


@pytest.fixture(params=list(JUDGES))
def server(request: pytest.FixtureRequest) -> Iterator[BatchServer]:
    with BatchServer(request.param, longest(request.param)) as running:
        yield running


def judged(folder: Path, judge: RemoteJudge, budget: BudgetConfig | None = None) -> tuple[list[tuple[str, str]], dict[str, Any]]:
    """Winner and loser by prompt, and the jury's figures."""
    labels: list[tuple[str, str]] = []

    def take(item: Any) -> None:
        verdict = item.judgement.verdict
        labels.append((verdict.winner_id, verdict.loser_id) if verdict and verdict.winner_id else ("", ""))

    async def main() -> dict[str, Any]:
        async with open_jury(judge, Accounts(folder / "ledger.sqlite", budget or BudgetConfig())) as jury:
            await judge_prompts(jury, PROMPTS, ANSWERS, take, seed=4)
            return jury.figures()

    return labels, asyncio.run(main())


RIGHT = [(f"{prompt.id}/dddd", f"{prompt.id}/a") for prompt in PROMPTS]


ONE_CALL = 107 * 1000 / 1e6 / 2


def priced(folder: Path, server: BatchServer, **settings: Any) -> tuple[RemoteJudge, BudgetConfig]:
    """A judge whose calls cost ONE_CALL in a batch, and a budget that bears them."""
    prices = folder / "prices.yaml"
    prices.write_text("as_of: 2026-11-24\nmodels: {judge: {input: 1000.0, output: 1000.0, batch: 0.5}}\n")
    return server.judge(free=False, max_output_tokens=10, **settings), BudgetConfig(usd_per_run=1e6, prices=str(prices))


def lines_left(folder: Path) -> int:
    with Ledger(folder / "ledger.sqlite") as ledger:
        return int(ledger.read(lambda db: db.execute("SELECT count(*) FROM batch_lines").fetchone())[0])


def test_a_round_takes_four_waves_and_pays_for_each_call_once(tmp_path: Path, server: BatchServer) -> None:
    labels, figures = judged(tmp_path, server.judge())
    assert labels == RIGHT
    assert len(server.batches) == 4, "two rounds of the knockout, the losers' match, both orders of the last pair"
    assert set(server.billed.values()) == {1}
    assert figures["calls_asked"] == len(server.billed) == server.billed.total()
    assert figures["input_tokens"] == 100 * figures["calls_asked"]
    assert lines_left(tmp_path) == 0
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert len(server.batches) == 4, "the ledger knows it all"


def test_rows_may_come_in_any_order_and_twice(tmp_path: Path, server: BatchServer) -> None:
    server.twist = lambda rows: shuffled([*rows, *rows])
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert set(server.billed.values()) == {1}


def test_what_expired_or_is_missing_goes_into_another_batch(tmp_path: Path, server: BatchServer) -> None:
    right = server.answer
    seen: Counter[str] = Counter()

    def answer(line: str, body: dict[str, Any]) -> Step | None:
        seen[line] += 1
        return None if int(line[:2], 16) % 2 and seen[line] == 1 else right(line, body)

    server.answer = answer
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert max(seen.values()) == 2
    assert set(server.billed.values()) == {1}


def test_a_row_that_the_vendor_loses_is_read_again_then_asked_again_and_its_money_stays_set_aside(
    tmp_path: Path, server: BatchServer
) -> None:
    server.twist = lambda rows: rows[1:] if len(server.batches) == 1 else rows
    judge, budget = priced(tmp_path, server, outage_s=0.2)
    labels, figures = judged(tmp_path, judge, budget)
    assert labels == RIGHT
    assert sorted(server.billed.values())[-2:] == [1, 2], "one row is lost, and one call paid twice"
    assert figures["budget"]["run"]["never_settled_usd"] > 0
    assert figures["budget"]["run"]["calls"] == server.billed.total()


@pytest.mark.parametrize("fault", ["html", "torn", "late files"])
def test_rows_that_cannot_be_read_for_a_while_are_read_later_and_paid_once(tmp_path: Path, server: BatchServer, fault: str) -> None:
    if fault == "late files":
        server.hidden_looks = 4
    else:
        server.fails_at, server.faults = re.compile("GET .*(content|results)"), [fault, fault]
    judge, budget = priced(tmp_path, server)
    labels, figures = judged(tmp_path, judge, budget)
    assert labels == RIGHT
    assert set(server.times_sent.values()) == {1}
    assert figures["budget"]["run"]["calls"] == len(server.billed)
    assert figures["budget"]["run"]["spent_usd"] == pytest.approx(len(server.billed) * ONE_CALL)


def test_rows_that_stay_unreadable_stop_the_stage_and_nothing_is_sent_again(tmp_path: Path, server: BatchServer) -> None:
    server.fails_at, server.faults = re.compile("GET .*(content|results)"), ["html"] * 1_000
    with pytest.raises(JudgeUnavailableError, match="run the same command again"):
        judged(tmp_path, server.judge(outage_s=0.2))
    server.faults = []
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert set(server.times_sent.values()) == {1}


def test_a_call_that_never_runs_is_undecided_and_is_asked_again_another_time(tmp_path: Path, server: BatchServer) -> None:
    right = server.answer
    server.answer = lambda line, body: None
    labels, figures = judged(tmp_path, server.judge())
    assert labels == [("", "")] * len(PROMPTS)
    assert figures["undecided_calls"].keys() == {"unavailable"}
    assert lines_left(tmp_path) == 0
    server.answer = right
    assert judged(tmp_path, server.judge())[0] == RIGHT


def test_each_kind_of_row_becomes_what_it_would_be_directly(tmp_path: Path, server: BatchServer) -> None:
    vendor = VENDORS[server.kind]
    steps = {
        "a": vendor.refusal("will not"),
        "b": vendor.text("no verdict"),
        "c": vendor.error(400, "maximum context length exceeded", "invalid_request_error"),
        "d": vendor.error(529 if server.kind == "anthropic" else 500, "overloaded", "overloaded_error"),
    }
    server.answer = lambda line, body: steps[shown(body)[0]]

    async def main() -> list[Any]:
        async with open_jury(server.judge(), Accounts(tmp_path / "ledger.sqlite")) as jury:
            asked = (jury.ask(PROMPTS[0], Candidate(name, name), Candidate("other", "other")) for name in steps)
            return list(await asyncio.gather(*asked))

    ballots = asyncio.run(main())
    reasons = [ballot.outcome.reason for ballot in ballots if isinstance(ballot.outcome, Undecided)]
    wanted = [UndecidedReason.REFUSED, UndecidedReason.MALFORMED, UndecidedReason.TRUNCATED, UndecidedReason.UNAVAILABLE]
    assert reasons == wanted
    assert [ballot.attempts for ballot in ballots] == [1, 2, 1, 4]


def test_a_truncated_verdict_gets_twice_the_room_in_the_next_batch(tmp_path: Path, server: BatchServer) -> None:
    vendor, rooms = VENDORS[server.kind], []

    def answer(line: str, body: dict[str, Any]) -> Step:
        rooms.append(body[vendor.room])
        return vendor.cut('{"rationale": "') if len(rooms) == 1 else vendor.text('{"rationale": "", "winner": "A"}')

    server.answer = answer

    async def main() -> Any:
        async with open_jury(server.judge(max_output_tokens=64), Accounts(tmp_path / "ledger.sqlite")) as jury:
            return await jury.ask(PROMPTS[0], Candidate("x", "x"), Candidate("y", "y"))

    ballot = asyncio.run(main())
    assert isinstance(ballot.outcome, Decided)
    assert (rooms, ballot.attempts, ballot.usage.output_tokens) == ([64, 128], 2, 14)


@pytest.mark.parametrize("fault", ["drop", "html", 503, 429])
def test_a_hand_over_that_is_cut_short_sends_no_batch_twice(tmp_path: Path, server: BatchServer, fault: str | int) -> None:
    server.faults = [fault]
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert len(server.batches) == 4
    assert set(server.billed.values()) == {1}


@pytest.mark.parametrize("where", ["GET .*/batches/batch_[0-9]+", "GET .*(content|results)"])
def test_an_outage_while_a_batch_runs_is_waited_out(tmp_path: Path, server: BatchServer, where: str) -> None:
    server.fails_at, server.faults = re.compile(where), ["drop", 500, "html", "torn", 429]
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert set(server.times_sent.values()) == {1}


def test_an_outage_that_lasts_ends_the_stage_and_the_batch_is_joined_later(tmp_path: Path, server: BatchServer) -> None:
    server.fails_at, server.faults = re.compile("GET .*/batches/batch_[0-9]+"), [503] * 1_000
    with pytest.raises(JudgeUnavailableError, match="run the same command again"):
        judged(tmp_path, server.judge(outage_s=0.2))
    server.faults = []
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert len(server.batches) == 4
    assert set(server.billed.values()) == {1}


def test_a_cancelled_batch_keeps_what_ran_and_stops_the_stage(tmp_path: Path, server: BatchServer) -> None:
    server.looks = 10_000

    async def main() -> None:
        async with open_jury(server.judge(), Accounts(tmp_path / "ledger.sqlite")) as jury:
            work = asyncio.create_task(judge_prompts(jury, PROMPTS, ANSWERS, lambda _: None, seed=4))
            while not server.batches:
                await asyncio.sleep(0.02)
            with server.lock:
                server.cancel(server.batches[0])
                server.looks = 1
            await work

    with pytest.raises(JudgeError, match=r"cancelled at the vendor .* after 12 of its 24 calls"):
        asyncio.run(main())
    assert judged(tmp_path, server.judge())[0] == RIGHT
    assert set(server.billed.values()) == {1}


def test_a_wrong_key_ends_the_stage_with_the_providers_words(tmp_path: Path, server: BatchServer) -> None:
    server.faults = [401]
    with pytest.raises(JudgeError, match=f"could not take a batch.*not now.*{server.judge().api_key_env}"):
        judged(tmp_path, server.judge())
    assert judged(tmp_path, server.judge())[0] == RIGHT


def test_max_calls_bounds_a_batch(tmp_path: Path, server: BatchServer) -> None:
    assert judged(tmp_path, server.judge(max_calls=5))[0] == RIGHT
    assert max(len(batch.lines) for batch in server.batches) <= 5
    assert set(server.billed.values()) == {1}


# ------------------------------------------------------------------------------------------------------------------- money


def test_a_batch_costs_half_and_is_set_aside_whole_before_it_is_sent(tmp_path: Path, server: BatchServer) -> None:
    judge, budget = priced(tmp_path, server)
    with pytest.raises(BudgetExceededError, match=r"the next batch of 24 calls could go over budget\.usd_per_run"):
        judged(tmp_path, judge, budget.model_copy(update={"usd_per_run": 1.0}))
    assert server.batches == []
    _, figures = judged(tmp_path, judge, budget)
    calls = figures["calls_asked"]
    assert figures["budget"]["run"]["spent_usd"] == pytest.approx(calls * ONE_CALL)
    assert figures["cost_usd"] == pytest.approx(calls * ONE_CALL)
    assert figures["budget"]["run"]["calls"] == calls
    assert figures["budget"]["run"]["under_way_usd"] == figures["budget"]["run"]["never_settled_usd"] == 0


def test_the_time_of_a_batch_is_no_part_of_a_calls_key(tmp_path: Path, server: BatchServer) -> None:
    """What was judged in batches is known when it is asked directly, and the other way round."""
    judge = server.judge()
    judged(tmp_path, judge)
    direct = judge.model_copy(update={"batch": None})
    assert judged(tmp_path, direct)[1]["calls_asked"] == 0
    assert isinstance(judge.batch, ApiBatch)
