"""Killed anywhere and started again, training ends with the same bits (CPU)."""

import json
import os
import random
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
from dpo_loop.config import AlarmLimits, AlarmsConfig, HeldOutConfig, KtoLoss, LoraShape, OptimizerConfig, TrainingConfig
from dpo_loop.errors import CorruptArtifactError, InputError
from dpo_loop.exchange import ALARMS, METRICS
from dpo_loop.training.dropout import dropout_paused
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.loop.accumulation import Objective, shortage_explained
from dpo_loop.training.loop.batches import cut_for
from dpo_loop.training.loop.checkpoints import KEPT, MANIFEST, STATE, read_newest_checkpoint, write_checkpoint
from dpo_loop.training.loop.fit import CHECKPOINTS, Fitted, Plan, fit
from dpo_loop.training.loop.held_out import held_out_rows
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, set_training_mode, trainable_parameters
from dpo_loop.training.objectives.examples import examples_of
from dpo_loop.training.reference import reference_logprobs
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs, stage_dir, train, training_config

NUM_PAIRS = 20
DROPOUT = LoraShape(rank=4, alpha=8, dropout=0.1)
PLAIN = training_config(epochs=2, lora=DROPOUT, micro_batch_tokens=50, checkpoint_every_steps=3)  # 3 steps an epoch: 8, 8, 4 pairs
STOPS_EARLY = training_config(
    epochs=4,
    pairs_per_step=4,
    lora=DROPOUT,
    micro_batch_tokens=40,
    checkpoint_every_steps=2,
    optimizer=OptimizerConfig(lr=2e-2),
    seed=1,  # with which held-out pairs get worse at every look, and not by a hair
    held_out=HeldOutConfig(share=0.2, min_pairs=2, every_steps=3, patience=2),
    alarms=AlarmsConfig(kl=AlarmLimits(warn=1e-3, stop=None), margin=AlarmLimits(warn=None, stop=None), window_steps=2),
)


KTO = PLAIN.model_copy(update={"loss": KtoLoss(kind="kto"), "held_out": HeldOutConfig(share=0.2, min_pairs=2, every_steps=3)})


class Interrupted(Exception):
    pass


class Breaks:
    """The objective, until its n-th micro-batch, of training or of a look at held-out pairs; too large ones do not fit into memory.

    break_at: counted from 1. most_rows: of a micro-batch; what is larger asks the real allocator for a petabyte.
    """

    def __init__(self, objective: Objective, break_at: int | None = None, *, most_rows: int | None = None) -> None:
        self.objective, self.break_at, self.most_rows = objective, break_at, most_rows
        self.num_micro_batches = 0
        self.sizes: list[int] = []
        self.trained: list[Sequence[int]] = []

    def size(self, rows: Sequence[int]) -> int:
        return self.objective.size(rows)

    def estimates(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        return self.objective.estimates(rows)

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        return self.objective.metrics(sums, rows, step=step)

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, torch.Tensor]:
        self.num_micro_batches += 1
        if self.num_micro_batches == self.break_at:
            raise Interrupted
        sums = self.objective.sums(rows, estimates=estimates)
        if self.most_rows is not None and len(rows) > self.most_rows:
            torch.empty(1 << 50, dtype=torch.uint8)
        self.sizes.append(len(rows))
        if torch.is_grad_enabled():
            self.trained.append(rows)
        return sums


def attempt(
    base: PolicyRef,
    keep: Path,
    config: TrainingConfig,
    *,
    break_at: int | None = None,
    most_rows: int | None = None,
    kind: type[Breaks] = Breaks,
) -> tuple[dict[str, torch.Tensor], Fitted, Breaks]:
    """One run of the loop: (adapter weights, what it returned, the objective)."""
    accelerator = build_accelerator("float32")
    pairs = make_pairs(NUM_PAIRS, seed=6)
    keep.mkdir(exist_ok=True)
    held_out = held_out_rows(pairs, config.held_out, seed=config.seed)
    examples = examples_of(pairs, held_out=held_out, feedback=None, base=Path(base.base), config=config)
    reference = reference_logprobs(base, examples.referred, accelerator=accelerator, keep=keep, max_tokens=400)
    model = add_adapter(load_base(base.base, accelerator=accelerator, frozen=True), config.lora, seed=0)
    set_training_mode(model, gradient_checkpointing=False)
    scorer = build_scorer(model, device=accelerator.device, forward=config.forward)
    objective = kind(examples.build(scorer, reference, None), break_at, most_rows=most_rows)
    plan = Plan(
        stage="train",
        label="sigmoid",
        num_tokens=examples.num_tokens,
        cut=cut_for(scorer, lambda row: examples.rows[row]),
        epochs=config.epochs,
        per_step=examples.per_pair * config.pairs_per_step,
        micro_batch_tokens=config.micro_batch_tokens,
        checkpoint_every_steps=config.checkpoint_every_steps,
        optimizer=config.optimizer,
        seed=config.seed,
        estimates=examples.spread_of_estimates(scorer),
        held_out=examples.held_out,
        held_out_config=config.held_out,
        alarms=config.alarms,
        expected_memory="12 GiB",
    )
    parameters = trainable_parameters(model, adapter_only=True)
    fitted = fit(objective, plan=plan, model=model, parameters=parameters, accelerator=accelerator, keep=keep)
    return {name: p.detach().clone() for name, p in parameters.items()}, fitted, objective


def without_clock(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


@pytest.mark.parametrize("config", [PLAIN, STOPS_EARLY, KTO], ids=["plain", "stops early", "kto"])
def test_interrupted_at_random_micro_batches_and_resumed_ends_with_the_same_bits(
    config: TrainingConfig, tmp_path: Path, base: PolicyRef
) -> None:
    weights, whole, objective = attempt(base, tmp_path / "whole", config)
    num = objective.num_micro_batches
    assert num > 2.5 * len(whole.rows)  # several a step, so that most interruptions fall inside one
    assert (whole.stopped_early_at is not None) == (config is STOPS_EARLY)
    points = random.Random(5).sample(range(2, num), 8)
    for break_at in (1, *points, num):
        keep = tmp_path / str(break_at)
        with pytest.raises(Interrupted):
            attempt(base, keep, config, break_at=break_at)
        again, fitted, _ = attempt(base, keep, config)
        assert without_clock(fitted.rows) == without_clock(whole.rows)
        assert fitted.alarms == whole.alarms
        assert (fitted.stopped_early_at, fitted.weights_of_step) == (whole.stopped_early_at, whole.weights_of_step)
        assert [json.loads(line)["step"] for line in (keep / METRICS).read_text().splitlines()] == [r["step"] for r in whole.rows]
        assert len((keep / ALARMS).read_text().splitlines()) == len(whole.alarms)
        for name, tensor in weights.items():
            assert torch.equal(tensor, again[name]), (break_at, name)


def test_early_stop_ends_with_the_weights_of_the_best_look(tmp_path: Path, base: PolicyRef) -> None:
    _, fitted, _ = attempt(base, tmp_path / "patient", STOPS_EARLY)
    looks = {row["step"]: row["held_out_loss"] for row in fitted.rows if "held_out_loss" in row}
    assert list(looks) == list(range(3, fitted.stopped_early_at + 1, 3))
    assert fitted.weights_of_step == min(looks, key=looks.get) == fitted.stopped_early_at - 6
    assert {alarm.name for alarm in fitted.alarms} >= {"kl"}
    assert len({(alarm.name, alarm.level) for alarm in fitted.alarms}) == len(fitted.alarms)  # each once
    weights, patient, _ = attempt(base, tmp_path / "patient", STOPS_EARLY)  # of a run that had ended already
    best = torch.load(newest(tmp_path / "patient") / STATE, weights_only=True)["best"]
    assert all(torch.equal(best["weights"][name], tensor) for name, tensor in weights.items())
    until = STOPS_EARLY.model_copy(update={"held_out": STOPS_EARLY.held_out.model_copy(update={"patience": None})})
    _, ran, _ = attempt(base, tmp_path / "impatient", until)
    assert (len(ran.rows), ran.stopped_early_at, ran.weights_of_step) == (16, None, 16)
    assert without_clock(ran.rows[: len(patient.rows)]) == without_clock(patient.rows)  # looks change nothing


def test_held_out_pairs_are_never_trained_on_and_looks_draw_no_dropout(tmp_path: Path, base: PolicyRef) -> None:
    _, fitted, objective = attempt(base, tmp_path, STOPS_EARLY)
    held_out = held_out_rows(make_pairs(NUM_PAIRS, seed=6), STOPS_EARLY.held_out, seed=STOPS_EARLY.seed)
    assert (len(held_out), fitted.rows[0]["pairs"]) == (4, 4)
    seen = {row for rows in objective.trained for row in rows}
    assert seen == set(range(NUM_PAIRS)) - set(held_out)
    inner = objective.objective
    with torch.no_grad(), dropout_paused(inner.scorer.model):
        sums = {name: float(value) for name, value in inner.sums(held_out, estimates={}).items()}
    look = fitted.rows[fitted.weights_of_step - 1]
    assert look["held_out_loss"] == pytest.approx(inner.metrics(sums, held_out, step=1)["loss"], rel=1e-6)


def test_memory_that_runs_out_once_halves_the_token_budget_for_good(
    tmp_path: Path, base: PolicyRef, capsys: pytest.CaptureFixture[str]
) -> None:
    config = training_config(epochs=2, micro_batch_tokens=200, checkpoint_every_steps=3, forward="padded")
    _, whole, objective = attempt(base, tmp_path / "whole", config)
    most = max(objective.sizes)
    weights, halved, tight = attempt(base, tmp_path / "tight", config, most_rows=most - 1)
    assert max(tight.sizes) < most
    assert halved.micro_batch_tokens == 100
    lines = [line for line in capsys.readouterr().out.splitlines() if "ran out of memory" in line]
    assert len(lines) == 1
    assert "can't allocate memory: you tried to allocate 1125899906842624 bytes" in lines[0]
    assert "micro-batches of 100 tokens" in lines[0]
    for one, other in zip(whole.rows, halved.rows, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    first_after = objective.sizes.index(most) + 1
    with pytest.raises(Interrupted):
        attempt(base, tmp_path / "killed", config, most_rows=most - 1, break_at=first_after + 12)
    again, resumed, _ = attempt(base, tmp_path / "killed", config)  # there is enough now, and still it is the same training
    assert without_clock(resumed.rows) == without_clock(halved.rows)
    assert all(torch.equal(weights[name], tensor) for name, tensor in again.items())


def test_memory_that_runs_out_twice_is_an_error_with_what_was_expected(tmp_path: Path, base: PolicyRef) -> None:
    with pytest.raises(
        InputError, match=r"with micro-batches of 25 tokens does not fit into memory .*can't allocate.*Expected were 12 GiB"
    ):
        attempt(base, tmp_path, PLAIN, most_rows=0)


def test_memory_that_runs_out_elsewhere_is_explained_with_the_plan() -> None:
    explained = shortage_explained("training (sigmoid)", expected="0.5 of 8.0 GiB (weights 0.00)")
    with (
        pytest.raises(
            InputError, match=r"\(sigmoid\) does not fit.*can't allocate memory.*Expected were 0\.5 of 8\.0 GiB.*quantize_base"
        ),
        explained,
    ):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), shortage_explained("training", expected=""):
        torch.zeros(2).view(3)


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
    assert list((scratch(killed) / CHECKPOINTS).glob("step-*"))
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


# ------------------------------------------------------------------------------------------------------------ checkpoints


def newest(keep: Path) -> Path:
    return max((keep / CHECKPOINTS).glob("step-*"))


def write(folder: Path, *steps: int, **provenance: Any) -> None:
    for step in steps:
        write_checkpoint(
            folder, step=step, state={"value": torch.tensor(step)}, provenance=provenance, circumstances={"packed": True}
        )


def read(folder: Path, *, packed: bool = True, **provenance: Any) -> tuple[int, int] | None:
    found = read_newest_checkpoint(folder, stage="train", provenance=provenance, circumstances={"packed": packed})
    return found and (found[0], int(found[1]["value"]))


def test_old_checkpoints_are_pruned_and_a_torn_one_is_never_seen(tmp_path: Path) -> None:
    write(tmp_path, 2, 4, 6)
    (tmp_path / ".step-00000008.tmp").mkdir()
    (tmp_path / ".step-00000008.tmp" / STATE).write_bytes(b"half")
    assert len(list(tmp_path.glob("step-*"))) == KEPT
    assert read(tmp_path) == (6, 6)
    write(tmp_path, 8)
    assert read(tmp_path) == (8, 8)


@pytest.mark.parametrize("damage", [STATE, MANIFEST])
def test_a_damaged_checkpoint_is_passed_over_with_a_line(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 2, 4)
    (tmp_path / "step-00000004" / damage).write_bytes(b"{}")
    assert read(tmp_path) == (2, 2)
    line = capsys.readouterr().out
    assert line.startswith("train: the checkpoint ")
    assert "step-00000004 is damaged" in line
    assert "going back to the one of step 2" in line
    write(tmp_path, 4)  # training comes to where the damaged one lies
    assert read(tmp_path) == (4, 4)


def test_checkpoints_that_are_all_damaged_are_named_with_the_way_out(tmp_path: Path) -> None:
    write(tmp_path, 2, 4)
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    (tmp_path / "step-00000004" / STATE).write_bytes(b"not a checkpoint")
    with pytest.raises(CorruptArtifactError, match=r"step-00000004 is damaged.*step-00000002 is damaged.*Remove .* begins anew"):
        read(tmp_path)


def test_a_checkpoint_of_another_training_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 2, reference="a", token_ids="b")
    assert read(tmp_path, reference="a", token_ids="b") == (2, 2)
    with pytest.raises(CorruptArtifactError, match=r"was made from other inputs \(reference, token_ids\)"):
        read(tmp_path, reference="c")


def test_another_forward_may_go_on_from_a_checkpoint_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 2)
    assert read(tmp_path, packed=False) == (2, 2)
    assert "packed was True when the checkpoint was written and is False" in capsys.readouterr().out
