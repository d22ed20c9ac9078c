"""The one training loop, for SFT and DPO: optimizer steps over micro-batches, metrics, checkpoints, exact resume.

On a CPU a run that was killed at any point and started again ends with the same bits: the order is a pure function of the seed,
dropout is drawn from (seed, step), and a checkpoint holds weights and optimizer state of a finished step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_loop.config import OptimizerConfig
from dpo_loop.errors import TrainingDivergedError
from dpo_loop.exchange import METRICS
from dpo_loop.files import write_jsonl
from dpo_loop.journal import Journal
from dpo_loop.progress import say
from dpo_loop.training.batches import micro_batches, optimizer_steps
from dpo_loop.training.checkpoints import read_newest_checkpoint, write_checkpoint
from dpo_loop.training.optimizer import build_optimizer, lr_at

SAY_EVERY_S = 2.0


class Objective(Protocol):
    """What is minimised, seen from the loop: examples are row numbers."""

    def size(self, rows: Sequence[int]) -> int:
        """What the sums over these rows are divided by to become means: pairs, or scored tokens."""
        ...

    def sums(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """One micro-batch: scalar sums over its rows. `loss` is differentiable, the others feed `metrics`."""
        ...

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        """The figures of optimizer step `step`, 0-based, from the sums over all its rows. May raise TrainingDivergedError."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """stage and label open the progress lines, `seed: sft step 3/9`. lengths: tokens that example i puts through the model."""

    stage: str
    label: str
    lengths: Sequence[int]
    epochs: int
    per_step: int
    micro_batch_tokens: int
    checkpoint_every_steps: int
    optimizer: OptimizerConfig
    seed: int


def fit(
    objective: Objective, *, plan: Plan, parameters: Mapping[str, torch.nn.Parameter], accelerator: Any, keep: Path
) -> list[dict[str, Any]]:
    """Train `parameters` in place; returns the metrics of every step.

    keep: the scratch directory of the stage; checkpoints and metrics.jsonl live there.
    Raises TrainingDivergedError at the first loss or gradient that is not finite, before it touches a weight.
    """
    steps = optimizer_steps(len(plan.lengths), epochs=plan.epochs, per_step=plan.per_step, seed=plan.seed)
    optimizer = build_optimizer(parameters.values(), plan.optimizer)
    first, rows_so_far = _resume(keep, parameters, optimizer)
    if first:
        say(f"{plan.stage}: {plan.label} resumes after step {first}/{len(steps)}")
    progress = _Progress(plan, num_steps=len(steps), first=first)
    with Journal(keep / METRICS) as journal:
        for step in range(first, len(steps)):
            rows, started = steps[step], time.monotonic()
            torch.manual_seed(plan.seed * 1_000_003 + step)
            lr = lr_at(step, num_steps=len(steps), config=plan.optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
            sums = _accumulate(objective, rows, plan, accelerator)
            grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters.values(), plan.optimizer.max_grad_norm))
            if not (math.isfinite(sums["loss"]) and math.isfinite(grad_norm)):
                raise _diverged(plan.label, step, sums["loss"], grad_norm, rows_so_far, keep / METRICS)
            figures = objective.metrics(sums, rows, step=step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            tokens_per_s = sum(plan.lengths[row] for row in rows) / (time.monotonic() - started)
            row = {"step": step + 1, **figures, "grad_norm": grad_norm, "lr": lr, "tokens_per_s": round(tokens_per_s, 1)}
            journal.append([row])
            rows_so_far.append(row)
            if (step + 1) % plan.checkpoint_every_steps == 0:
                state = {"parameters": {name: p.detach() for name, p in parameters.items()}, "optimizer": optimizer.state_dict()}
                write_checkpoint(_checkpoints(keep), step=step + 1, state=state)
            progress.show(row)
    return rows_so_far


def _accumulate(objective: Objective, rows: Sequence[int], plan: Plan, accelerator: Any) -> dict[str, float]:
    """Backward over all micro-batches of one step; the sums over its rows."""
    size = objective.size(rows)
    parts = []
    for micro in micro_batches(rows, plan.lengths, max_tokens=plan.micro_batch_tokens, device=accelerator.device.type):
        with accelerator.autocast():
            sums = objective.sums(micro)
        accelerator.backward(sums["loss"] / size)
        parts.append(torch.stack([value.detach() for value in sums.values()]).double())
    return dict(zip(sums, torch.stack(parts).sum(0).tolist(), strict=True))


def _resume(
    keep: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, Any]]]:
    """Restore the newest checkpoint; (steps done, their metrics). What was measured after it is measured again."""
    found = read_newest_checkpoint(_checkpoints(keep))
    step = 0
    if found is not None:
        step, state = found
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["parameters"][name])
        optimizer.load_state_dict(state["optimizer"])
    with Journal(keep / METRICS) as journal:
        rows = [row for row in journal.rows if row["step"] <= step]
    write_jsonl(keep / METRICS, rows)
    return step, rows


def _checkpoints(keep: Path) -> Path:
    return keep / "checkpoints"


def _diverged(
    label: str, step: int, loss: float, grad_norm: float, rows: Sequence[Mapping[str, Any]], metrics: Path
) -> TrainingDivergedError:
    last = ", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()) if rows else "none, it was the first step"
    return TrainingDivergedError(
        f"{label} diverged at step {step + 1}: loss sum {loss}, gradient norm {grad_norm}. Last good step: {last}. Nothing was published; "
        f"the metrics up to there are kept in {metrics}. Ways out: a lower learning rate, a smaller max_grad_norm, or look at the pairs."
    )


class _Progress:
    def __init__(self, plan: Plan, *, num_steps: int, first: int) -> None:
        self.opening, self.num_steps, self.first = f"{plan.stage}: {plan.label}", num_steps, first
        self.started = self.said = time.monotonic()

    def show(self, row: Mapping[str, Any]) -> None:
        now, step = time.monotonic(), row["step"]
        if now - self.said < SAY_EVERY_S and step != self.num_steps:
            return
        self.said = now
        left_s = (now - self.started) / (step - self.first) * (self.num_steps - step)
        say(
            f"{self.opening} step {step}/{self.num_steps}, loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tok/s, {left_s:.0f} s left"
        )
