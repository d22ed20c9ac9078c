"""kill -9 at fifty random moments of judging: nothing is paid twice but what was under way, and the verdicts are the same."""

from __future__ import annotations

import multiprocessing
import random
import sqlite3
import time
from collections import Counter
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.exchange import JUDGEMENTS
from judges.accounts import Accounts
from judges.config import OpenAICompatibleJudge
from judges.stage import judge_stage
from tests.judges.stub import Stub, says
from tests.judges.world import make_prompt, write_answers, write_prompts

NUM_KILLS = 50
CONCURRENCY = 6


def judge_all(world: Path, run: Path, judge: OpenAICompatibleJudge) -> None:
    accounts = Accounts(run / "ledger.sqlite")
    materialize(
        judge_stage(accounts), run / "judge", prompts=world / "prompts", completions=world / "generate", judge=judge, seed=0
    )


@pytest.mark.slow
def test_fifty_kills_pay_only_for_what_was_under_way_and_change_no_verdict(tmp_path: Path, stub: Stub) -> None:
    stub.policy = lambda body: says("A" if sum(body["messages"][1]["content"].encode()) % 2 else "B", delay_s=0.01)
    prompts = [make_prompt(f"Question {number}") for number in range(150)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["one", "two", "three", "four"]) for prompt in prompts])
    judge = stub.judge(concurrency=CONCURRENCY)
    # Each child is a fresh fork of a server that has the SDK loaded: importing it fifty times would be most of the test.
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["tests.judges.test_kill", "judges.openai_dialects"])
    moment = random.Random(17)

    cut_short: set[tuple[str, int]] = set()
    num_lost = 0
    """Calls that the server had taken in, and answered to nobody."""
    for _ in range(NUM_KILLS):
        child = fork.Process(target=judge_all, args=(tmp_path, tmp_path, judge))
        seen = len(stub.seen)
        child.start()
        while len(stub.seen) == seen:
            assert child.is_alive(), "the judge ended before it could be killed"
            time.sleep(0.001)
        time.sleep(moment.uniform(0, 0.08))
        child.kill()
        child.join()
        assert child.exitcode == -9, "the judge ended before it could be killed"
        wait_until_quiet(stub)
        in_flight = {(key, times) for key, status, times in rows(tmp_path) if status == "in_flight"}
        assert len(in_flight - cut_short) <= CONCURRENCY
        cut_short |= in_flight
        num_lost += len(set(stub.keys[seen:]) & {key for key, _ in in_flight})

    judge_all(tmp_path, tmp_path, judge)
    calls = rows(tmp_path)
    assert {status for _, status, _ in calls} == {"done"}
    assert sum(times for _, _, times in calls) == len(calls) + len(cut_short)
    # A call that was cut short may have been claimed and not yet sent: the server saw it or did not.
    billed = Counter(stub.keys)
    assert set(billed) == {key for key, _, _ in calls}
    assert all(billed[key] <= times for key, _, times in calls)
    assert len(stub.keys) == len(calls) + num_lost
    assert num_lost > 0, "no kill hit a call that the server had seen"
    judge_all(tmp_path, tmp_path / "uninterrupted", judge)
    assert (tmp_path / "uninterrupted" / "judge" / JUDGEMENTS).read_bytes() == (tmp_path / "judge" / JUDGEMENTS).read_bytes()


def wait_until_quiet(stub: Stub) -> None:
    """What the dead process had sent may still be on its way."""
    num = -1
    while num != len(stub.seen):
        num = len(stub.seen)
        time.sleep(0.02)


def rows(run: Path) -> list[tuple[str, str, int]]:
    """Key, status and how often it was asked."""
    db = sqlite3.connect(run / "ledger.sqlite")
    try:
        return db.execute("SELECT key, status, times_asked FROM calls").fetchall()
    finally:
        db.close()
