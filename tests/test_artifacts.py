"""The stage contract (design §5): once, whole, unchanged, or a clear error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_loop.artifacts import Stage, fingerprint, materialize, read_manifest, scratch, stage_key
from dpo_loop.config import EngineConfig, JsonlPool, SigmoidLoss, TrainingConfig
from dpo_loop.errors import BusyError, CorruptArtifactError, InputError, StaleArtifactError, StorageError
from dpo_loop.files import hold
from dpo_loop.types import PolicyRef, StageOutcome, Tally

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3), max_leaves=4
)


def counting_stage(version: int = 1) -> tuple[Stage, list[int]]:
    runs: list[int] = []

    def run(out: Path, **inputs: object) -> StageOutcome:
        runs.append(1)
        (out / "rows.txt").write_text(repr(sorted(inputs.items())))
        return StageOutcome(metrics={"runs": len(runs)})

    return Stage("count", version, run), runs


@given(inputs=st.dictionaries(st.sampled_from("abc"), json_values, max_size=3))
def test_the_same_key_runs_once(tmp_path_factory: pytest.TempPathFactory, inputs: dict[str, object]) -> None:
    stage, runs = counting_stage()
    out = tmp_path_factory.mktemp("same") / "count"
    first, second = materialize(stage, out, **inputs), materialize(stage, out, **inputs)
    assert first == second
    assert len(runs) == 1


@given(one=st.dictionaries(st.sampled_from("ab"), json_values), other=st.dictionaries(st.sampled_from("ab"), json_values))
def test_other_inputs_are_refused_with_both_keys_and_what_differs(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, object], other: dict[str, object]
) -> None:
    stage, runs = counting_stage()
    out = tmp_path_factory.mktemp("other") / "count"
    materialize(stage, out, **one)
    if json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True):
        return
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(StaleArtifactError) as caught:
        materialize(stage, out, **other)
    assert stage_key(stage, one)[:12] in str(caught.value)
    assert stage_key(stage, other)[:12] in str(caught.value)
    changed = [name for name in "ab" if one.get(name, "absent") != other.get(name, "absent")]
    assert all(name in str(caught.value) for name in changed)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    assert len(runs) == 1


def test_another_version_of_the_stage_is_refused(tmp_path: Path) -> None:
    materialize(counting_stage(1)[0], tmp_path / "count", x=1)
    with pytest.raises(StaleArtifactError, match=r"version of the stage \(1 → 2\)"):
        materialize(counting_stage(2)[0], tmp_path / "count", x=1)


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found(tmp_path_factory: pytest.TempPathFactory, position: int, bit: int) -> None:
    stage, _ = counting_stage()
    out = tmp_path_factory.mktemp("flip") / "count"
    materialize(stage, out, x="some text")
    path = out / "rows.txt"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1 << bit
    path.write_bytes(content)
    with pytest.raises(CorruptArtifactError, match=r"rows\.txt has changed"):
        materialize(stage, out, x="some text")


def test_a_missing_file_and_a_broken_manifest_are_found(tmp_path: Path) -> None:
    stage, _ = counting_stage()
    out = tmp_path / "count"
    materialize(stage, out, x=1)
    (out / "rows.txt").unlink()
    with pytest.raises(CorruptArtifactError, match="is missing"):
        materialize(stage, out, x=1)
    (out / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtifactError, match="not a stage manifest"):
        materialize(stage, out, x=1)
    (out / "manifest.json").unlink()
    with pytest.raises(CorruptArtifactError, match="no stage published it"):
        materialize(stage, out, x=1)


def test_a_death_at_any_file_operation_publishes_nothing_or_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.crash_points", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["points"] > 20
    assert report["partial"] == 0
    assert report["published_before_end"] >= 1


def test_a_failed_stage_publishes_nothing_and_its_scratch_survives_for_the_same_key_only(tmp_path: Path) -> None:
    def run(out: Path, *, fail: bool) -> StageOutcome:
        kept = scratch(out) / "progress"
        seen = kept.exists()
        kept.write_text("half")
        (out / "leftover").write_text("x")
        if fail:
            raise RuntimeError("power cut")
        return StageOutcome(metrics={"seen": seen})

    out = tmp_path / "half"
    with pytest.raises(RuntimeError, match="power cut"):
        materialize(Stage("half", 1, run), out, fail=True)
    assert not out.exists()
    with pytest.raises(RuntimeError, match="power cut"):
        materialize(Stage("half", 1, run), out, fail=True)
    assert (tmp_path / ".half.scratch" / "progress").exists()
    manifest = materialize(Stage("half", 1, run), out, fail=False)
    assert manifest.outcome.metrics == {"seen": False}, "another key must not see the scratch of the first"
    assert sorted(manifest.files) == ["leftover"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".half.lock", "half"]


def test_scratch_of_a_published_stage_is_cleared_and_costs_no_lock_where_there_is_none(tmp_path: Path) -> None:
    stage, runs = counting_stage()
    out = tmp_path / "count"
    made = materialize(stage, out, x=1)
    (scratch(out) / "checkpoint").write_text("as a kill after the rename leaves it")
    with hold(tmp_path / ".count.lock", wait_s=0, what="test"), pytest.raises(BusyError):
        materialize(stage, out, wait_s=0, x=1)
    assert materialize(stage, out, x=1) == made
    assert sorted(path.name for path in tmp_path.iterdir()) == [".count.lock", "count"]
    with hold(tmp_path / ".count.lock", wait_s=0, what="test"):
        assert materialize(stage, out, wait_s=0, x=1) == made
    assert len(runs) == 1


WRITER = """
import os, sys, time
from pathlib import Path
from dpo_loop.artifacts import Stage, materialize
from dpo_loop.types import StageOutcome

def run(out):
    for name in "abcd":
        (out / name).write_text(str(os.getpid())); time.sleep(0.1)
    return StageOutcome()

print(materialize(Stage("w", 1, run), Path(sys.argv[1]), wait_s=20).key)
"""


def test_two_writers_cannot_mix(tmp_path: Path) -> None:
    out = tmp_path / "w"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(out)], stdout=subprocess.PIPE) for _ in range(2)]
    keys = [writer.communicate(timeout=60)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0]
    assert keys[0] == keys[1]
    assert len({(out / name).read_text() for name in "abcd"}) == 1


def test_a_writer_that_never_ends_makes_the_second_busy(tmp_path: Path) -> None:
    stage, runs = counting_stage()
    with hold(tmp_path / ".count.lock", wait_s=0, what="test"), pytest.raises(BusyError, match=f"pid {os.getpid()}"):
        materialize(stage, tmp_path / "count", wait_s=0.2, x=1)
    assert not runs
    materialize(stage, tmp_path / "count", wait_s=0, x=1)


def test_a_killed_writer_frees_the_lock(tmp_path: Path) -> None:
    code = WRITER.replace("time.sleep(0.1)", "time.sleep(60)")
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "w")])
    while not (tmp_path / ".w.work" / "a").exists():
        assert writer.poll() is None
        time.sleep(0.02)
    writer.kill()
    writer.wait()
    stage = Stage("w", 1, lambda out: StageOutcome())
    assert materialize(stage, tmp_path / "w", wait_s=5).files == {}


def test_a_full_disk_is_a_storage_error_that_loses_nothing(tmp_path: Path) -> None:
    def run(out: Path) -> StageOutcome:
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)
        return StageOutcome()

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full to stand for a full disk")
    with pytest.raises(StorageError, match="No space left on device"):
        materialize(Stage("full", 1, run), tmp_path / "full")
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    "words",
    [
        "Error while serializing: I/O error: No space left on device (os error 28)",  # safetensors 0.6 on a full tmpfs
        "database or disk is full",  # SQLite
    ],
)
def test_a_full_disk_is_a_storage_error_in_the_words_of_any_library(tmp_path: Path, words: str) -> None:
    def run(out: Path) -> StageOutcome:
        raise RuntimeError(words)

    with pytest.raises(StorageError, match="the disk is full"):
        materialize(Stage("full", 1, run), tmp_path / "full")


def test_a_directory_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/sys/dpo-loop/count")  # permission bits do not stop root; sysfs does
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "count"
    with pytest.raises(StorageError, match="cannot write"):
        materialize(counting_stage()[0], target, x=1)


def test_keys_cover_content_not_location(tmp_path: Path) -> None:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "file").write_text("same")
        (folder / ".hidden").write_text(name)
    assert fingerprint(tmp_path / "one") == fingerprint(tmp_path / "two")
    assert fingerprint(tmp_path / "one" / "file") == fingerprint(tmp_path / "two" / "file")
    here = PolicyRef(base="/here", base_sha256="b", adapter="/here/a", adapter_sha256="a")
    there = PolicyRef(base="/there", base_sha256="b", adapter="/there/a", adapter_sha256="a", canary="/c")
    assert fingerprint(here) == fingerprint(there)
    assert here.key == there.key
    assert fingerprint(JsonlPool(kind="jsonl", path="/x")) == fingerprint(JsonlPool(kind="jsonl", path="/y"))
    with pytest.raises(InputError, match="does not exist"):
        fingerprint(tmp_path / "three")


def test_how_fast_does_not_change_the_key_but_what_does() -> None:
    engine = EngineConfig(kind="vllm_offline")
    assert fingerprint(engine) == fingerprint(engine.model_copy(update={"gpu_memory_utilization": 0.5}))
    assert fingerprint(engine) != fingerprint(engine.model_copy(update={"dtype": "float32"}))
    training = TrainingConfig(loss=SigmoidLoss(kind="sigmoid"))
    assert fingerprint(training) == fingerprint(training.model_copy(update={"micro_batch_tokens": 1}))
    assert fingerprint(training) != fingerprint(training.model_copy(update={"seed": 1}))


def test_inputs_are_verified_when_they_are_published_stages(tmp_path: Path) -> None:
    stage, _ = counting_stage()
    materialize(stage, tmp_path / "count", x=1)
    before = fingerprint(tmp_path / "count")
    (tmp_path / "count" / "rows.txt").write_text("changed")
    assert before
    with pytest.raises(CorruptArtifactError):
        fingerprint(tmp_path / "count")


def test_the_manifest_tells_what_when_and_with_which_versions(tmp_path: Path) -> None:
    stage, _ = counting_stage()
    manifest = materialize(stage, tmp_path / "count", x=1)
    assert read_manifest(tmp_path / "count") == manifest
    assert manifest.stage == "count"
    assert manifest.inputs == {"x": 1}
    assert manifest.versions["dpo-loop"]
    assert manifest.seconds >= 0
    assert manifest.machine["cpus"] == os.cpu_count()


@given(parts=st.dictionaries(st.text(max_size=3), st.integers(0, 9), min_size=1), off=st.integers(-3, 3))
def test_counts_add_up_or_are_refused(parts: dict[str, int], off: int) -> None:
    total = sum(parts.values()) + off
    if off == 0:
        assert Tally(of="prompts", total=total, parts=parts).total == total
    else:
        with pytest.raises(ValidationError, match="do not add up"):
            Tally(of="prompts", total=total, parts=parts)
