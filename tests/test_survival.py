"""The loop, played for real with the tiny config: it finishes, it can be killed anywhere, and a finished run costs nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import read_manifest
from dpo_loop.layout import RunDir
from dpo_loop.policies import adapter_sha256
from flows.config import load_config
from flows.steps import stages_of
from tests.conftest import TINY_CONFIG
from tests.prefect_server import PrefectServer

STAGES_OF_ROUND_0, STAGES = (stages_of(load_config(TINY_CONFIG), number) for number in (0, 1))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(run_dir: Path, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """`dpo-loop run` in a process group of its own."""
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY_CONFIG), "--set", f"run_dir={run_dir}"]
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=env)


def finish(run_dir: Path, log: Path, env: dict[str, str]) -> None:
    process = start(run_dir, log, env)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]


def shown(run_dir: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "show", str(run_dir), "--json"], capture_output=True, text=True, check=True
    )
    rounds: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rounds"]
    return rounds


def test_a_run_plays_every_stage_of_every_round(whole_run: RunDir) -> None:
    rounds = shown(whole_run.path)
    assert [row["round"] for row in rounds] == list(range(len(rounds)))
    assert len(rounds) >= 2
    assert rounds[0]["gate"] is None
    for row in rounds[1:]:
        assert row["gate"] in {"PASS", "FAIL", "INCONCLUSIVE", "NEEDS_REVIEW"}
        assert row["num_pairs"] > 0
        for rate in ("pass_rate", "win_rate_previous", "win_rate_anchor", "harmful_rate", "over_refusal_rate"):
            assert 0 <= row[rate] <= 1
        assert set(row["seconds"]) >= set(STAGES)
        assert all(read_manifest(whole_run.round(row["round"]).stage(stage)) for stage in STAGES)
    assert all(Path(row["report"]).is_file() for row in rounds)


def test_a_finished_run_started_again_recomputes_nothing(whole_run: RunDir, tmp_path: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole_run.path.glob("rounds/*/*/manifest.json")}

    before = times()
    finish(whole_run.path, tmp_path / "again.log", dict(os.environ))
    assert times() == before


def training_of(round_dir: Path) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
    """What a training computed, step by step to the last bit, and under which circumstances."""
    steps = [json.loads(line) for line in (round_dir / "train" / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((round_dir / "train" / "manifest.json").read_text())
    circumstances = {name: manifest["outcome"]["metrics"][name] for name in ("packed", "micro_batch_tokens", "num_threads")}
    return [{**row, "tokens_per_s": None} for row in steps], adapter_sha256(round_dir / "train" / "adapter"), circumstances


def kill_in(stage: str, round_number: int, run: RunDir, log: Path, env: dict[str, str]) -> bool:
    """Start the run and `kill -9` its process group while the stage is being written. True if it was caught at work."""
    out = run.round(round_number).stage(stage)
    work = out.parent / f".{stage}.work"
    process = start(run.path, log, env)
    deadline = time.monotonic() + 300
    while not work.exists() and not out.exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    caught = not out.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return caught


def test_kill_9_in_every_stage_leaves_the_same_pairs(whole_run: RunDir, prefect_server: PrefectServer, tmp_path: Path) -> None:
    run, log = RunDir(tmp_path / "killed"), tmp_path / "killed.log"
    _, _, circumstances = training_of(whole_run.round(1).path)
    env = prefect_server.env | {"OMP_NUM_THREADS": str(circumstances["num_threads"])}  # on which the last bits depend
    # Every stage once: those that round 0 alone has, and those of a round.
    victims = [*((stage, 0) for stage in STAGES_OF_ROUND_0 if stage not in STAGES), *((stage, 1) for stage in STAGES)]
    caught, finished = [], {}
    for stage, round_number in victims:
        if kill_in(stage, round_number, run, log, env):
            caught.append((stage, round_number))
        for manifest in run.path.glob("rounds/*/[!.]*/manifest.json"):  # one that is killed in the act may hold one already
            finished.setdefault(manifest, manifest.read_bytes())
    finish(run.path, log, env)
    assert len(caught) >= len(victims) - 3, f"only {caught} were caught at work"
    for manifest, content in finished.items():
        assert manifest.read_bytes() == content, f"{manifest} was made again"
    rounds = [path.name for path in sorted((whole_run.path / "rounds").iterdir())]
    for name in rounds[1:]:
        whole, killed = (each.path / "rounds" / name for each in (whole_run, run))
        assert (whole / "pair" / "pairs.jsonl").read_bytes() == (killed / "pair" / "pairs.jsonl").read_bytes()
        assert training_of(whole) == training_of(killed), "the same pairs made another adapter"
    keys = ("gate", "promoted", "num_pairs", "pass_rate", "win_rate_previous", "harmful_rate", "over_refusal_rate")
    assert [[row[key] for key in keys] for row in shown(run.path)] == [[row[key] for key in keys] for row in shown(whole_run.path)]
