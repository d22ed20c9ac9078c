"""kill -9 while a round is judged in batches: no batch is sent twice, none is lost, and the verdicts are the same."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.exchange import JUDGEMENTS
from judges.config import RemoteJudge
from tests.judges.batch_server import BatchServer
from tests.judges.stub import Step
from tests.judges.test_kill import judge_all
from tests.judges.vendors import VENDORS
from tests.judges.world import make_prompt, write_answers, write_prompts

NUM_KILLS = 15
KINDS = ["openai", "anthropic"]


def arbitrary(kind: str) -> Callable[[str, dict[str, Any]], Step]:
    """A verdict that follows from the line's id."""
    texts = [VENDORS[kind].text(json.dumps({"rationale": "", "winner": winner})) for winner in "AB"]
    return lambda line, body: texts[int(line[0], 16) % 2]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    prompts = [make_prompt(f"Question {number}") for number in range(60)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["one", "two", "three", "four"]) for prompt in prompts])
    return tmp_path


def start(world: Path, judge: RemoteJudge) -> BaseProcess:
    """A fresh fork of a server that has the SDKs loaded."""
    fork = multiprocessing.get_context("forkserver")
    fork.set_forkserver_preload(["tests.judges.test_batch_kill", "judges.openai_dialects", "judges.anthropic_dialect"])
    child = fork.Process(target=judge_all, args=(world, world, judge))
    child.start()
    return child


def assert_as_if_never_killed(world: Path, server: BatchServer) -> None:
    judge_all(world, world, server.judge(max_calls=10))
    assert set(server.times_sent.values()) == {1}
    assert set(server.billed.values()) == {1}
    killed = (world / "judge" / JUDGEMENTS).read_bytes()
    judge_all(world, world / "uninterrupted", server.judge())
    assert (world / "uninterrupted" / "judge" / JUDGEMENTS).read_bytes() == killed


@pytest.mark.parametrize("kind", KINDS)
def test_a_kill_between_the_making_of_a_batch_and_its_id_pays_nothing_twice(world: Path, kind: str) -> None:
    with BatchServer(kind, arbitrary(kind)) as server:
        pids: queue.Queue[int] = queue.Queue()
        server.created = lambda: os.kill(pids.get(), signal.SIGKILL)
        child = start(world, server.judge())
        assert child.pid is not None
        pids.put(child.pid)
        child.join()
        assert child.exitcode == -9
        assert len(server.batches) == 1
        server.created = lambda: None
        judge_all(world, world, server.judge())
        assert len(server.batches) == 4, "the first one was found again"
        assert_as_if_never_killed(world, server)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_kills_while_many_batches_of_one_size_are_handed_over_and_waited_for(world: Path, kind: str) -> None:
    """Half of the kills hit the moment when a batch is made and nobody was told of it, with others of the same size open."""
    moment = random.Random(5)
    with BatchServer(kind, arbitrary(kind)) as server:
        server.looks = 3
        num_killed = 0
        for number in range(NUM_KILLS):
            pids: queue.Queue[int] = queue.Queue()
            left = [moment.randint(1, 3)]

            def created(pids: queue.Queue[int] = pids, left: list[int] = left) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(pids.get(), signal.SIGKILL)

            server.created = created if number % 2 else lambda: None
            child = start(world, server.judge(max_calls=10))
            assert child.pid is not None
            pids.put(child.pid)
            if number % 2:
                child.join(20)
            else:
                time.sleep(moment.uniform(0.05, 0.6))
                child.kill()
                child.join()
            num_killed += child.exitcode == -9
            if child.exitcode == 0:
                break
        server.created = lambda: None
        assert num_killed >= 6
        assert_as_if_never_killed(world, server)
