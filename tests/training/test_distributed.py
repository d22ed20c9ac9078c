"""Several processes under `accelerate launch` train what one does: real processes, gloo, CPU."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpo_loop.artifacts import scratch, stage_key
from dpo_loop.config import HeldOutConfig, OptimizerConfig
from dpo_loop.errors import InputError, StageFailedError, StorageError, TrainingDivergedError
from dpo_loop.exchange import METRICS, PAIRS
from dpo_loop.training.launch import SPEC, error_file, launch, leave_word
from dpo_loop.training.loop.fit import CHECKPOINTS
from dpo_loop.training.prerequisites import accelerate_problems
from dpo_loop.training.processes import Processes
from dpo_loop.training.run import Job
from dpo_loop.training.stage import TRAIN
from dpo_loop.types import PolicyRef, StageManifest
from tests.training.world import make_pairs, stage_dir, train, training_config, write_pairs

FSDP2 = Path(__file__).parents[2] / "deploy" / "accelerate" / "fsdp2.yaml"
HELD_OUT = HeldOutConfig(share=0.2, min_pairs=4, every_steps=2)


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]


def assert_same_curve(one: Path, two: Path) -> None:
    assert len(metrics(one)) == len(metrics(two))
    for row, other in zip(metrics(one), metrics(two), strict=True):
        assert row.keys() == other.keys()
        for name in ("loss", "nll", "held_out_loss"):
            if name in row:
                assert other[name] == pytest.approx(row[name], rel=1e-6), (row["step"], name)
    weights, others = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (one, two))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        # AdamW divides by the root of what may be a square of almost nothing: an element may differ by a part of the learning rate.
        assert float((tensor - others[name]).abs().max()) < 2e-4, name
        assert float((tensor - others[name]).norm() / tensor.norm()) < 1e-4, name


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_two_processes_have_the_loss_curve_of_one(loss: str, tmp_path: Path, base: PolicyRef) -> None:
    """41 pairs, 8 of them held out: the last of five steps has one pair, so one process has nothing to do in it."""
    pairs = write_pairs(tmp_path / "pair", make_pairs(41))
    config = training_config(loss={"kind": loss}, held_out=HELD_OUT)
    manifests: list[StageManifest] = []
    for num in (1, 2):
        several = config.model_copy(update={"num_processes": num})
        manifests.append(train(tmp_path / str(num), pairs=pairs, policy=base, config=several))
    assert_same_curve(stage_dir(tmp_path / "1"), stage_dir(tmp_path / "2"))
    assert manifests[0].key == manifests[1].key  # how many there were is no part of what was made
    assert manifests[0].outcome.tallies == manifests[1].outcome.tallies


def test_a_base_in_shards_is_trained_as_a_whole_one(tmp_path: Path, adapted: PolicyRef, capsys: pytest.CaptureFixture[str]) -> None:
    """With the accelerate config that is shipped, on the CPU."""
    pairs = write_pairs(tmp_path / "pair", make_pairs(41))
    config = training_config(held_out=HELD_OUT, gradient_checkpointing=True)
    train(tmp_path / "whole", pairs=pairs, policy=adapted, config=config)
    sharded = config.model_copy(update={"num_processes": 2, "accelerate_config": str(FSDP2)})
    capsys.readouterr()
    train(tmp_path / "shards", pairs=pairs, policy=adapted, config=sharded)
    assert "base in 2 shards" in capsys.readouterr().out
    assert_same_curve(stage_dir(tmp_path / "whole"), stage_dir(tmp_path / "shards"))
    canaries = [json.loads((stage_dir(tmp_path / name) / "canary.json").read_text())["sequences"] for name in ("whole", "shards")]
    for one, other in zip(*canaries, strict=True):
        assert other["policy_logprobs"] == pytest.approx(one["policy_logprobs"], abs=1e-3)
        assert other["base_logprobs"] == pytest.approx(one["base_logprobs"], abs=1e-5)


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("fsdp_version: 2", "fsdp_version: 1", "fsdp_version must be 2"),
        ("params: false", "params: true", "fsdp_offload_params must be false"),
        ("loading: false", "loading: true", "fsdp_cpu_ram_efficient_loading must be false"),
        ("num_machines: 1", "num_machines: 2", "num_machines must be 1"),
        ("type: FSDP", "type: DEEPSPEED", "distributed_type is DEEPSPEED"),
        ("type: FSDP", "type: 'NO'", "distributed_type NO starts one process, but num_processes is 8; take MULTI_GPU"),
        ("type: FSDP", "type: NO", r"distributed_type is False; it can be 'NO' \(in quotes"),
        ("num_processes: 8", "num_processes: auto", "num_processes is auto; it must be a whole number from 1 up"),
        ("num_processes: 8", "num_processes: 0", "num_processes is 0; it must be"),
        ("num_processes: 8", "num_processes: -1", "num_processes is -1; it must be"),
        ("machine_rank: 0", "machine_rnk: 0", "unknown keys machine_rnk; the accelerate that is installed would not start"),
        ("LOCAL_MACHINE", "AMAZON_SAGEMAKER", "compute_environment must be LOCAL_MACHINE"),
        ("fsdp_config:", "fsdp_config: yes\ndebug:", "fsdp_config is True; it must hold keys"),
    ],
)
def test_what_cannot_be_launched_is_refused_with_its_key(
    old: str, new: str, problem: str, tmp_path: Path, base: PolicyRef, pairs: Path
) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(FSDP2.read_text().replace(old, new))
    config = training_config(num_processes=2, accelerate_config=str(other))
    with pytest.raises(InputError, match=rf"training\.accelerate_config: .*other\.yaml: {problem}"):
        train(tmp_path, pairs=pairs, policy=base, config=config)


def test_the_shipped_accelerate_config_can_be_launched_but_not_over_4_bits() -> None:
    sharded = training_config(num_processes=2, accelerate_config=str(FSDP2))
    assert accelerate_problems(sharded) == []
    (problem,) = accelerate_problems(sharded.model_copy(update={"quantize_base": "nf4"}))
    assert "leave out training.quantize_base" in problem


def test_a_config_of_one_process_is_refused_for_two(tmp_path: Path) -> None:
    """accelerate would start one, and say nothing."""
    path = tmp_path / "one.yaml"
    path.write_text("distributed_type: 'NO'\nnum_processes: 1\n")
    assert accelerate_problems(training_config(accelerate_config=str(path))) == []
    (problem,) = accelerate_problems(training_config(num_processes=2, accelerate_config=str(path)))
    assert "num_processes is 2; take MULTI_GPU" in problem


def test_a_process_that_is_killed_is_named_and_fewer_go_on_from_its_checkpoint(
    tmp_path: Path, base: PolicyRef, pairs: Path
) -> None:
    config = training_config(epochs=60, num_processes=2)
    out = stage_dir(tmp_path / "killed")
    stopper = threading.Thread(target=_kill, args=(out, lambda pids: os.kill(pids["1"], signal.SIGKILL)))
    stopper.start()
    with pytest.raises(StageFailedError, match=r"process 1 of 2 was killed by signal 9 \(SIGKILL\)") as caught:
        train(tmp_path / "killed", pairs=pairs, policy=base, config=config)
    stopper.join()
    assert caught.value.returncode == 137
    assert caught.value.retryable
    assert workers_of(out) == {}
    assert not out.exists()
    assert list((scratch(out) / CHECKPOINTS).glob("step-*"))
    alone = config.model_copy(update={"num_processes": 1})
    train(tmp_path / "killed", pairs=pairs, policy=base, config=alone)
    train(tmp_path / "whole", pairs=pairs, policy=base, config=alone)
    curves = [[row["loss"] for row in metrics(stage_dir(tmp_path / name))] for name in ("killed", "whole")]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_an_error_of_the_processes_is_raised_as_it_was_there(
    tmp_path: Path, base: PolicyRef, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hot = training_config(num_processes=2, optimizer=OptimizerConfig(lr=1e30, warmup_ratio=0.0))
    with pytest.raises(TrainingDivergedError, match="diverged at step 2"):
        train(tmp_path, pairs=pairs, policy=base, config=hot)
    assert [row["step"] for row in metrics(scratch(stage_dir(tmp_path)))] == [1]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("train: reference ") for line in lines) == 1  # only the main one has lines to say


def job_of(folder: Path, base: PolicyRef, *, held_out: tuple[int, ...] = ()) -> Job:
    """As the stage makes it, for two processes."""
    out, keep = folder / "out", folder / "keep"
    out.mkdir(parents=True)
    write_pairs(keep, make_pairs(8))
    config = training_config(num_processes=2)
    fixed = {"stage_key": "k", "feedback": None, "policy": base, "reference": base, "config": config}
    return Job(out=out, keep=keep, pairs=keep / PAIRS, held_out=held_out, **fixed)


def test_a_full_disk_of_a_process_is_the_error_that_it_is_of_the_stage(tmp_path: Path, base: PolicyRef) -> None:
    job = job_of(tmp_path, base)
    (job.out / METRICS).symlink_to("/dev/full")
    with pytest.raises(StorageError, match=r"cannot write .*No space left on device\. Free space"):
        launch(job)


def test_any_other_exception_of_a_process_comes_back_with_its_traceback(tmp_path: Path, base: PolicyRef) -> None:
    job = job_of(tmp_path, base, held_out=(99,))  # no such pair
    with pytest.raises(StageFailedError, match=r"in process [01]:\nTraceback [\s\S]*IndexError: list index out of range") as caught:
        launch(job)
    assert (caught.value.returncode, caught.value.retryable) == (1, False)


def test_the_last_word_of_a_process_needs_no_room_on_the_disk(tmp_path: Path) -> None:
    spec = tmp_path / SPEC
    error_file(spec, 0).write_bytes(bytes(1 << 16))
    leave_word(spec, 0, StorageError("the disk is full"))
    content = error_file(spec, 0).read_bytes()
    assert len(content) == 1 << 16
    assert str(pickle.loads(content)) == "the disk is full"


def test_a_launcher_that_is_killed_is_named(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    config = training_config(epochs=200, num_processes=2)
    out = stage_dir(tmp_path)
    stopper = threading.Thread(target=_kill, args=(out, lambda pids: os.kill(parent_of(pids["0"]), signal.SIGKILL)))
    stopper.start()
    said = r"the launcher of 2 processes was killed by signal 9 \(SIGKILL\); the others were ended\. The kernel kills so where memory runs out"
    with pytest.raises(StageFailedError, match=said) as caught:
        train(tmp_path, pairs=pairs, policy=base, config=config)
    stopper.join()
    assert (caught.value.returncode, caught.value.retryable) == (137, True)
    assert workers_of(out) == {}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


@pytest.mark.slow
def test_a_stage_that_is_killed_leaves_no_process(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    config = training_config(epochs=500, num_processes=2)
    out = stage_dir(tmp_path)
    code = (
        "import sys; from pathlib import Path; from dpo_loop.config import TrainingConfig; from dpo_loop.types import PolicyRef;"
        "from tests.training.world import train;"
        "run, pairs, policy, config = sys.argv[1:];"
        "train(Path(run), pairs=Path(pairs), policy=PolicyRef.model_validate_json(policy), config=TrainingConfig.model_validate_json(config))"
    )
    stage = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(pairs), base.model_dump_json(), config.model_dump_json()],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _kill(out, lambda _: os.kill(stage.pid, signal.SIGKILL))
    assert stage.wait() == -signal.SIGKILL
    end = time.monotonic() + 60
    while workers_of(out) and time.monotonic() < end:
        time.sleep(0.1)
    assert workers_of(out) == {}


def workers_of(out: Path) -> dict[str, int]:
    """Rank → pid of the workers that train for this stage."""
    spec, found = str(out.parent / f".{out.name}.scratch" / "job.json"), {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        ranks = [entry.removeprefix("RANK=") for entry in environment if entry.startswith("RANK=")]
        if spec in command and ranks:
            found[ranks[0]] = int(folder.name)
    return found


def _kill(out: Path, kill: Callable[[dict[str, int]], None]) -> None:
    """Once training is past its first checkpoints."""
    path = out.parent / f".{out.name}.scratch" / METRICS
    end = time.monotonic() + 240
    while not (path.is_file() and len(path.read_bytes().splitlines()) >= 7):
        assert time.monotonic() < end, "training did not begin"
        time.sleep(0.01)
    kill(workers_of(out))


def test_the_number_of_processes_is_not_in_the_key(base: PolicyRef, pairs: Path) -> None:
    def key(**changes: object) -> str:
        inputs = {"pairs": pairs, "policy": base, "run_start": base, "config": training_config(**changes)}
        return stage_key(TRAIN, inputs)

    assert key() == key(num_processes=4, accelerate_config="fsdp2.yaml", trackers=("tensorboard",))
    assert key() != key(seed=1)


def test_an_accelerate_config_that_is_not_there_is_named(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    with pytest.raises(InputError, match=r"accelerate_config: .*nowhere\.yaml cannot be read \(No such file"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(accelerate_config=str(tmp_path / "nowhere.yaml")))


@pytest.mark.parametrize(("num", "num_rows"), [(1, 7), (2, 7), (2, 1), (4, 3), (3, 50)])
def test_every_row_of_a_step_is_computed_by_one_process_and_loads_are_even(num: int, num_rows: int) -> None:
    num_tokens = [1 + (row * 37) % 90 for row in range(num_rows)]

    def cut(rows: list[int], max_tokens: int) -> list[list[int]]:
        micros: list[list[int]] = []
        for row in rows:
            if micros and sum(num_tokens[each] for each in micros[-1]) + num_tokens[row] <= max_tokens:
                micros[-1].append(row)
            else:
                micros.append([row])
        return micros

    def share(index: int) -> list[list[int]]:
        accelerator = SimpleNamespace(num_processes=num, process_index=index, device=torch.device("cpu"))
        mine = Processes(accelerator).share(range(num_rows), cut=cut, num_tokens=num_tokens, max_tokens=200)
        assert all(micro.counts for micro in mine)
        return [list(micro.rows) for micro in mine]

    shares = [share(index) for index in range(num)]
    assert sorted(row for micros in shares for micro in micros for row in micro) == list(range(num_rows))
    assert shares[0]
    loads = [sum(num_tokens[row] for micro in micros for row in micro) for micros in shares]
    assert max(loads) - min(loads) <= max(sum(num_tokens[row] for row in micro) for micros in shares for micro in micros)
