"""Killed anywhere and started again, training ends with the same bits (CPU)."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_loop.artifacts import scratch
from dpo_loop.config import LoraShape
from dpo_loop.errors import CorruptArtifactError, TrainingDivergedError
from dpo_loop.exchange import METRICS
from dpo_loop.training.checkpoints import KEPT, read_newest_checkpoint, write_checkpoint
from dpo_loop.training.fit import Plan, fit
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, set_training_mode, trainable_parameters
from dpo_loop.training.preferences import DpoObjective, sequences_of
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs, stage_dir, train, training_config

CONFIG = training_config(epochs=2, lora=LoraShape(rank=4, alpha=8, dropout=0.1), micro_batch_tokens=100, checkpoint_every_steps=3)
NUM_PAIRS = 20  # 3 steps an epoch: 8, 8, 4 pairs


class Interrupted(Exception):
    pass


class Breaks:
    """The objective, until its n-th micro-batch."""

    def __init__(self, objective: DpoObjective, after: int | None) -> None:
        self.objective, self.left = objective, after
        self.num_micro_batches = 0

    def size(self, rows: Sequence[int]) -> int:
        return self.objective.size(rows)

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        return self.objective.metrics(sums, rows, step=step)

    def sums(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        self.num_micro_batches += 1
        if self.num_micro_batches == self.left:
            raise Interrupted
        return self.objective.sums(rows)


def attempt(base: PolicyRef, keep: Path, *, break_at: int | None = None) -> tuple[dict[str, torch.Tensor], list[dict], int]:
    """One run of the loop with dropout on: (adapter weights, metrics less the clock, micro-batches)."""
    accelerator = build_accelerator("float32")
    chosen, rejected = sequences_of(make_pairs(NUM_PAIRS, seed=6))
    keep.mkdir(exist_ok=True)
    values = reference_logprobs(base, [*chosen, *rejected], accelerator=accelerator, keep=keep, max_tokens=400)
    model = add_adapter(load_base(base.base, accelerator=accelerator, frozen=True), CONFIG.lora, seed=0)
    set_training_mode(model, gradient_checkpointing=False)
    objective = DpoObjective(
        model,
        chosen,
        rejected,
        chosen_reference=values[:NUM_PAIRS],
        rejected_reference=values[NUM_PAIRS:],
        config=CONFIG,
        device=accelerator.device,
        start_tolerance=None,
    )
    breaking = Breaks(objective, break_at)
    plan = Plan(
        stage="train",
        label="dpo",
        lengths=[2 * max(c.num_forwarded, r.num_forwarded) for c, r in zip(chosen, rejected, strict=True)],
        epochs=CONFIG.epochs,
        per_step=CONFIG.pairs_per_step,
        micro_batch_tokens=CONFIG.micro_batch_tokens,
        checkpoint_every_steps=CONFIG.checkpoint_every_steps,
        optimizer=CONFIG.optimizer,
        seed=CONFIG.seed,
    )
    parameters = trainable_parameters(model, adapter_only=True)
    rows = fit(breaking, plan=plan, parameters=parameters, accelerator=accelerator, keep=keep)
    return {name: p.detach().clone() for name, p in parameters.items()}, without_clock(rows), breaking.num_micro_batches


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def test_interrupted_at_any_micro_batch_and_resumed_ends_with_the_same_bits(tmp_path: Path, base: PolicyRef) -> None:
    weights, metrics, num_micro_batches = attempt(base, tmp_path / "whole")
    assert len(metrics) == 6
    assert num_micro_batches > 12  # several per step, so that some interruptions fall inside one
    for break_at in (1, 2, num_micro_batches // 2, num_micro_batches // 2 + 1, num_micro_batches - 2, num_micro_batches):
        keep = tmp_path / str(break_at)
        with pytest.raises(Interrupted):
            attempt(base, keep, break_at=break_at)
        again, metrics_again, num_again = attempt(base, keep)
        assert metrics_again == metrics
        assert [json.loads(line)["step"] for line in (keep / METRICS).read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
        for name, tensor in weights.items():
            assert torch.equal(tensor, again[name]), (break_at, name)
        if break_at > num_micro_batches // 2 + 1:
            assert num_again < num_micro_batches  # it did go on from the checkpoint of step 3


@pytest.mark.slow
def test_a_stage_killed_with_sigkill_ends_with_the_same_adapter(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    config = training_config(epochs=5)  # 30 steps
    train(tmp_path / "whole", pairs=pairs, policy=base, config=config)
    killed = stage_dir(tmp_path / "killed")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "killed"), str(pairs), base.model_dump_json(), config.model_dump_json()],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.DEVNULL,
    )
    killed.parent.mkdir(parents=True)
    metrics = scratch(killed) / METRICS
    while not (metrics.is_file() and len(metrics.read_bytes().splitlines()) >= 5):
        assert child.poll() is None, "the child ended before it could be killed"
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not killed.exists()
    assert read_newest_checkpoint(scratch(killed) / "checkpoints") is not None
    train(tmp_path / "killed", pairs=pairs, policy=base, config=config)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "canary.json"):
        assert (killed / name).read_bytes() == (stage_dir(tmp_path / "whole") / name).read_bytes(), name


CHILD = """
import sys
from pathlib import Path
from dpo_loop.config import TrainingConfig
from dpo_loop.types import PolicyRef
from tests.training.world import train

run, pairs, policy, config = sys.argv[1:]
train(Path(run), pairs=Path(pairs), policy=PolicyRef.model_validate_json(policy), config=TrainingConfig.model_validate_json(config))
"""


def test_reference_log_probs_are_kept_and_checked_against_the_policy(tmp_path: Path, base: PolicyRef, adapted: PolicyRef) -> None:
    accelerator = build_accelerator("float32")
    chosen, _ = sequences_of(make_pairs(6))
    first = reference_logprobs(base, chosen, accelerator=accelerator, keep=tmp_path, max_tokens=100)
    (kept,) = tmp_path.glob("reference-*.safetensors")
    again = reference_logprobs(base, chosen, accelerator=accelerator, keep=tmp_path, max_tokens=400)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    other = reference_logprobs(adapted, chosen, accelerator=accelerator, keep=tmp_path, max_tokens=100)
    assert max(float((one - two).abs().max()) for one, two in zip(first, other, strict=True)) > 1e-2
    (kept_other,) = set(tmp_path.glob("reference-*.safetensors")) - {kept}
    kept.write_bytes(kept_other.read_bytes())
    with pytest.raises(TrainingDivergedError, match="differ by"):
        reference_logprobs(base, chosen, accelerator=accelerator, keep=tmp_path, max_tokens=100)


def test_old_checkpoints_are_pruned_and_a_torn_one_is_never_seen(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step=step, state={"value": torch.tensor(step)})
    (tmp_path / "step-00000008.tmp").write_bytes(b"half")
    assert len(list(tmp_path.glob("step-*.pt"))) == KEPT
    step, state = read_newest_checkpoint(tmp_path)
    assert (step, int(state["value"])) == (6, 6)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, step=2, state={"value": torch.tensor(1)})
    (tmp_path / "step-00000002.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptArtifactError, match=r"step-00000002\.pt is damaged .*Remove it"):
        read_newest_checkpoint(tmp_path)
