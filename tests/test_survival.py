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
from dpo_loop.layout import STAGES, STAGES_OF_ROUND_0, RunDir

CONFIG = Path(__file__).parents[1] / "deploy" / "configs" / "tiny-test.yaml"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(run_dir: Path, log: Path) -> subprocess.Popen[bytes]:
    """`dpo-loop run` in a process group of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", "run", str(CONFIG), "--set", f"run_dir={run_dir}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def finish(run_dir: Path, log: Path) -> float:
    started = time.monotonic()
    process = start(run_dir, log)
    assert process.wait(timeout=600) == 0, log.read_text()[-3000:]
    return time.monotonic() - started


def shown(run_dir: Path) -> list[dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli", "show", str(run_dir), "--json"], capture_output=True, text=True, check=True
    )
    rounds: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["rounds"]
    return rounds


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def uninterrupted(home: Path) -> RunDir:
    finish(home / "whole", home / "whole.log")
    return RunDir(home / "whole")


def test_a_run_plays_every_stage_of_every_round(uninterrupted: RunDir) -> None:
    rounds = shown(uninterrupted.path)
    assert [row["round"] for row in rounds] == list(range(len(rounds)))
    assert len(rounds) >= 2
    assert rounds[0]["gate"] is None
    for row in rounds[1:]:
        assert row["gate"] in {"PASS", "FAIL", "INCONCLUSIVE", "NEEDS_REVIEW"}
        assert row["num_pairs"] > 0
        for rate in ("pass_rate", "win_rate_previous", "win_rate_anchor", "harmful_rate", "over_refusal_rate"):
            assert 0 <= row[rate] <= 1
        assert set(row["seconds"]) >= set(STAGES)
        assert all(read_manifest(uninterrupted.round(row["round"]).stage(stage)) for stage in STAGES)
    assert all(Path(row["report"]).is_file() for row in rounds)


def test_a_finished_run_started_again_recomputes_nothing(uninterrupted: RunDir, home: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in uninterrupted.path.glob("rounds/*/*/manifest.json")}

    before = times()
    finish(uninterrupted.path, home / "again.log")
    assert times() == before


def kill_in(stage: str, round_number: int, run: RunDir, log: Path) -> bool:
    """Start the run and `kill -9` its process group while the stage is being written. True if it was caught at work."""
    out = run.round(round_number).stage(stage)
    work = out.parent / f".{stage}.work"
    process = start(run.path, log)
    deadline = time.monotonic() + 300
    while not work.exists() and not out.exists():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    caught = not out.exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return caught


def test_kill_9_in_every_stage_leaves_the_same_pairs(uninterrupted: RunDir, home: Path) -> None:
    run, log = RunDir(home / "killed"), home / "killed.log"
    victims = [*((stage, 0) for stage in STAGES_OF_ROUND_0), *((stage, 1) for stage in STAGES)]
    caught, finished = [], {}
    for stage, round_number in victims:
        if kill_in(stage, round_number, run, log):
            caught.append((stage, round_number))
        for manifest in run.path.glob("rounds/*/*/manifest.json"):
            finished.setdefault(manifest, manifest.read_bytes())
    finish(run.path, log)
    assert len(caught) >= len(victims) - 3, f"only {caught} were caught at work"
    for manifest, content in finished.items():
        assert manifest.read_bytes() == content, f"{manifest} was made again"
    rounds = [path.name for path in sorted((uninterrupted.path / "rounds").iterdir())]
    for name in rounds[1:]:
        whole, killed = (r.path / "rounds" / name / "pair" / "pairs.jsonl" for r in (uninterrupted, run))
        assert whole.read_bytes() == killed.read_bytes()
    keys = ("gate", "promoted", "num_pairs", "pass_rate", "win_rate_previous", "harmful_rate", "over_refusal_rate")
    assert [[row[key] for key in keys] for row in shown(run.path)] == [
        [row[key] for key in keys] for row in shown(uninterrupted.path)
    ]
