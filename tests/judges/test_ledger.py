"""A call is answered once, whoever asks, however often and whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.errors import CorruptArtifactError, InputError, StorageError
from dpo_loop.exchange import JUDGEMENTS
from dpo_loop.types import Decided, Undecided, UndecidedReason
from judges.accounts import Accounts
from judges.backend import Reply
from judges.ledger import Claim, Ledger
from judges.stage import judge_stage
from tests.judges.stub import Stub, says
from tests.judges.world import make_prompt, write_answers, write_prompts

ROOT = Path(__file__).resolve().parents[2]
QUESTION = {"v": 1, "left_sha256": "x"}
YES = Reply(outcome=Decided(p_left=1.0, rationale="r"), raw="raw", served_model="m", request_id="i")


Test = Callable[..., Coroutine[Any, Any, None]]


def in_a_loop(test: Test) -> Callable[..., None]:
    """pytest runs plain functions; the arguments are still its fixtures."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def failed(reason: UndecidedReason) -> Reply:
    return Reply(outcome=Undecided(reason=reason, detail="why"))


@in_a_loop
async def test_a_final_reply_is_served_for_ever(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert await ledger.claim("k", QUESTION) is Claim.MINE
        await ledger.settle("k", YES)
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert await ledger.claim("k", QUESTION) == ledger.find("k") == YES
        assert ledger.counts() == {"done": 1}


@pytest.mark.parametrize("reason", UndecidedReason)
@in_a_loop
async def test_only_a_refusal_among_failures_is_final(tmp_path: Path, reason: UndecidedReason) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        await ledger.claim("k", QUESTION)
        await ledger.settle("k", failed(reason))
        ledger.keep("l", QUESTION, failed(reason))
        is_final = reason is UndecidedReason.REFUSED
        assert (ledger.find("k") is not None) == (ledger.find("l") is not None) == is_final
        assert ledger.counts() == ({"done": 2} if is_final else {"planned": 1})


@in_a_loop
async def test_a_claimed_call_is_nobody_elses_until_it_ends(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as one, Ledger(tmp_path / "ledger.sqlite") as other:
        assert await one.claim("k", QUESTION) is Claim.MINE
        assert await other.claim("k", QUESTION) is Claim.THEIRS
        await one.release("k", "interrupted")
        assert await other.claim("k", QUESTION) is Claim.MINE
        await one.settle("k", YES)
        assert one.find("k") is None, "a reply from one who lost the claim must not end another's call"
        await other.settle("k", YES)
        assert one.find("k") == YES


@in_a_loop
async def test_a_claim_ends_with_its_owner(tmp_path: Path) -> None:
    crashed = Ledger(tmp_path / "ledger.sqlite")
    await crashed.claim("k", QUESTION)
    crashed.close()
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.counts() == {"in_flight": 1}
        assert await ledger.claim("k", QUESTION) is Claim.MINE


def test_free_replies_are_written_together_and_read_at_once(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger, Ledger(tmp_path / "ledger.sqlite") as other:
        for number in range(10):
            ledger.keep(str(number), QUESTION, YES)
        assert ledger.find("3") == YES
        assert other.find("3") is None
        ledger.flush()
        assert other.find("3") == YES
        other.keep("3", QUESTION, Reply(outcome=Decided(p_left=0.0)))
        other.flush()
        assert ledger.find("3") == YES, "the first final reply stays"


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"not a database, but long enough to have a header" * 100)
    with pytest.raises(CorruptArtifactError, match="not a readable ledger"):
        Ledger(path)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    Ledger(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 7")
    db.close()
    with pytest.raises(InputError, match="version 7"):
        Ledger(path)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="ledger"):
        Ledger(tmp_path / "file" / "ledger.sqlite")


@in_a_loop
async def test_an_unfinished_transaction_leaves_nothing(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        with pytest.raises(TypeError):
            await ledger.claim("k", {"not json": object()})
        assert ledger.counts() == {}
        assert await ledger.claim("k", QUESTION) is Claim.MINE


# ------------------------------------------------------------------------------------- processes that share a ledger

_WRITER = """
import asyncio, sys
from judges.ledger import Claim, Ledger
from tests.judges.test_ledger import QUESTION, YES
async def main():
    for number in range(300):
        claim = await ledger.claim(f"shared-{number}", QUESTION)
        if claim is Claim.MINE:
            await ledger.settle(f"shared-{number}", YES)
            print(number)
        ledger.keep(f"{sys.argv[2]}-{number}", QUESTION, YES)
with Ledger(sys.argv[1]) as ledger:
    asyncio.run(main())
"""


def test_concurrent_writers_share_every_call_and_lose_none(tmp_path: Path) -> None:
    script = _WRITER.replace("Ledger(sys.argv[1])", "Ledger(__import__('pathlib').Path(sys.argv[1]))")
    command = [sys.executable, "-c", script, str(tmp_path / "ledger.sqlite")]
    writers = [subprocess.Popen([*command, str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for n in range(3)]
    asked = [line for writer in writers for line in writer.communicate(timeout=60)[0].split()]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    assert sorted(asked, key=int) == [str(number) for number in range(300)]
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        assert ledger.counts() == {"done": 300 + 3 * 300}


@pytest.mark.slow
def test_a_killed_judge_asks_no_finished_call_again(tmp_path: Path, stub: Stub) -> None:
    """kill -9 twice in mid-judging: what the server was asked = the keys + those under way at a kill."""
    stub.policy = lambda body: says("A" if hash(body["messages"][1]["content"]) % 2 else "B", delay_s=0.02)
    prompts = [make_prompt(f"Question {number}") for number in range(30)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["one", "two", "three", "four"]) for prompt in prompts])
    judge = stub.judge(concurrency=4)
    command = [sys.executable, "-m", "tests.judges.run_judge", str(tmp_path), judge.model_dump_json()]

    num_under_way, done = 0, set[str]()
    for num_asked in (25, 80):
        child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while len(stub.seen) < num_asked:
            assert child.poll() is None, "the judge ended before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        rows = _rows(tmp_path / "ledger.sqlite")
        now_done = {key for key, (status, _) in rows.items() if status == "done"}
        assert done <= now_done
        done = now_done
        num_under_way += sum(status == "in_flight" for status, _ in rows.values())

    assert subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, timeout=60).returncode == 0
    rows = _rows(tmp_path / "ledger.sqlite")
    assert {status for status, _ in rows.values()} == {"done"}
    assert set(stub.keys) == set(rows)
    assert len(stub.keys) - len(rows) <= num_under_way <= 2 * 4

    whole = tmp_path / "uninterrupted"
    materialize(
        judge_stage(Accounts(whole / "ledger.sqlite")),
        whole / "judge",
        prompts=tmp_path / "prompts",
        completions=tmp_path / "generate",
        judge=judge,
        seed=0,
    )
    assert (whole / "judge" / JUDGEMENTS).read_bytes() == (tmp_path / "judge" / JUDGEMENTS).read_bytes()


def _rows(path: Path) -> dict[str, tuple[str, int]]:
    db = sqlite3.connect(path)
    try:
        return {key: (status, times) for key, status, times in db.execute("SELECT key, status, times_asked FROM calls")}
    finally:
        db.close()
