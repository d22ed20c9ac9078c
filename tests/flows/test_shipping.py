"""The commands that ship; and what a forced export leaves written down."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dpo_loop.errors import InputError
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState
from flows.exporting import ExportManifest, export
from flows.shipments import force_of
from tests.flows.exports import FORCE, manifest_of, recorded

COMMAND = "from flows.cli import main; main()"


@pytest.fixture
def run(exportable: RunDir, tmp_path: Path) -> RunDir:
    """A copy that may be changed."""
    return RunDir(shutil.copytree(exportable.path, tmp_path / "run"))


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)


def test_a_forced_export_is_told_in_the_export_in_its_card_and_in_the_run(run: RunDir, tmp_path: Path) -> None:
    export(run, tmp_path / "good", what="adapter", force=FORCE)
    made = export(run, tmp_path / "out", what="adapter", round_number=2, force=FORCE)
    assert manifest_of(tmp_path / "out").forced == FORCE
    assert (made.gate_state, made.blessed_at) == (GateState.FAIL, None)
    card = ModelCard.load(tmp_path / "out" / "README.md").text.strip().splitlines()
    assert card[2].startswith("> **Warning: exported without the blessing of the safety gate.** Its gate said FAIL. ann forced")
    first, _, second, last = recorded(run)
    assert first["forced"] is None, "it was blessed, so nothing had to be forced"
    assert second["forced"] == FORCE.model_dump()
    assert (second["out"], second["rounds"], second["gate_state"]) == (str(tmp_path / "out"), [2], "FAIL")
    assert (second["event"], last["event"], last["out"]) == ("begun", "done", second["out"])
    assert "Warning" not in (tmp_path / "good" / "README.md").read_text()


@pytest.mark.parametrize(("reviewer", "reason"), [(None, "why"), ("ann", None), ("", "why"), ("ann", "  "), ("a", "why")])
def test_force_needs_a_name_and_a_reason(reviewer: str | None, reason: str | None) -> None:
    with pytest.raises(InputError, match="--force needs --reviewer NAME and --reason WHY"):
        force_of(reviewer, reason)


def test_the_command_exports_and_tells(run: RunDir, tmp_path: Path) -> None:
    done = command("export", str(run.path), "--what", "adapter", "--out", str(tmp_path / "out"), "--json")
    assert (done.returncode, done.stderr) == (0, "")
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.pop("out") == str(tmp_path / "out")
    assert ExportManifest.model_validate(told) == manifest_of(tmp_path / "out")
    force = ("--force", "--reviewer", "ann", "--reason", "why")
    done = command("export", str(run.path), "--what", "pairs", "--round", "2", "--out", str(tmp_path / "forced"), *force)
    assert done.returncode == 0
    assert "pairs of round 2 at" in done.stdout
    assert "num pairs: 5" in done.stdout
    assert "warning: it was not blessed" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--what", "adapter", "--round", "2"), "was not promoted"),
        (("--what", "adapter", "--format", "trl"), "--format is for --what pairs"),
        (("--what", "pairs", "--dtype", "bfloat16"), "--dtype is for --what merged"),
        (("--what", "adapter", "--reviewer", "ann"), "--reviewer and --reason are for --force"),
        (("--what", "adapter", "--force"), "--force needs --reviewer NAME and --reason WHY"),
        (("--what", "model"), "'model' is not one of"),
        ((), "Missing option '--what'"),
    ],
)
def test_the_command_refuses_with_a_sentence(run: RunDir, tmp_path: Path, words: tuple[str, ...], says: str) -> None:
    done = command("export", str(run.path), "--out", str(tmp_path / "out"), *words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_card_of_any_round_is_printed_or_written(run: RunDir, tmp_path: Path) -> None:
    printed = command("card", str(run.path), "2")
    assert printed.returncode == 0
    assert "**Not blessed: this round was not promoted" in ModelCard(printed.stdout).text
    written = command("card", str(run.path), "3", "--out", str(tmp_path / "CARD.md"), "--licence", "mit")
    assert (written.returncode, written.stdout) == (0, "")
    assert "A person decided: **approve** by bob" in ModelCard.load(tmp_path / "CARD.md").text
    start = command("card", str(run.path), "0")
    assert ModelCard(start.stdout).data.library_name == "transformers"
    before = run.config.read_bytes()
    for words in (("9",), ("1", "--out", str(tmp_path / "no" / "c.md")), ("1", "--out", str(run.config))):
        refused = command("card", str(run.path), *words)
        assert (refused.returncode, "Traceback" in refused.stderr) == (2, False)
    assert run.config.read_bytes() == before


def test_an_export_that_is_killed_leaves_nothing_and_the_next_one_clears_up(run: RunDir, tmp_path: Path) -> None:
    words = [sys.executable, "-c", COMMAND, "export", str(run.path), "--what", "merged", "--out", str(tmp_path / "out")]
    work = tmp_path / ".out.small.work"
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not work.is_dir() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
    assert work.is_dir()
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", what="adapter")
    manifest_of(tmp_path / "out")
    assert not work.exists()


def test_the_commands_load_nothing_heavy_until_they_need_it() -> None:
    code = (
        "import sys, flows.shipping; print([m for m in ('torch', 'pydantic', 'datasets', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
