"""The product's own training path on given token ids: its loader, adapter, probe, objective and training loop.

A micro-batch holds a given number of pairs, as TRL's does; elsewhere the product cuts by tokens. A pass is `fit` over one epoch, as the
`train` stage calls it, with its metrics on disk and without a checkpoint.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_loop.config import LoraShape, OptimizerConfig, SigmoidLoss
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.fit import Plan, fit
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, set_training_mode, trainable_parameters
from dpo_loop.training.objectives.preferences import PairObjective
from tests.benchmarks.shapes import IdPair, move_adapter


def sequences_of(pairs: Sequence[IdPair]) -> tuple[list[TokenSequence], list[TokenSequence]]:
    return [TokenSequence(p.prompt, p.chosen) for p in pairs], [TokenSequence(p.prompt, p.rejected) for p in pairs]


def lora_of(model: Any) -> dict[str, Any]:
    """What the adapter of a PEFT model is like, so that TRL can be given the same."""
    config = model.peft_config["default"]
    return {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
        "fan_in_fan_out": config.fan_in_fan_out,
    }


class OurSide:
    """What train_vs_trl asks of a side."""

    def __init__(
        self, model: str, pairs: Sequence[IdPair], *, rank: int, micro_pairs: int, pairs_per_step: int, checkpointing: bool, device: str
    ) -> None:  # fmt: skip
        self.micro_pairs, self.pairs_per_step = micro_pairs, pairs_per_step
        self.accelerator = build_accelerator("bfloat16" if device == "cuda" else "float32")
        base = load_base(model, accelerator=self.accelerator, frozen=True)
        self.model = add_adapter(base, LoraShape(rank=rank, alpha=2 * rank), seed=0)
        move_adapter(self.model)
        set_training_mode(self.model, gradient_checkpointing=checkpointing)
        self.chosen, self.rejected = sequences_of(pairs)
        self.scorer = build_scorer(
            self.model, device=self.accelerator.device, forward="auto", autocast=self.accelerator.autocast,
            longest=max(sequence.num_forwarded for sequence in (*self.chosen, *self.rejected)),
        )  # fmt: skip
        self.reference = _OnLineReference(self.model, self.scorer, self.accelerator, self.chosen, self.rejected)
        self.objective = PairObjective(
            self.scorer, self.chosen, self.rejected, chosen_reference=self.reference.chosen, rejected_reference=self.reference.rejected,
            loss=SigmoidLoss(kind="sigmoid", beta=0.1), nll_weight=0.0, start_tolerance=None,
        )  # fmt: skip
        began = time.perf_counter()
        for rows in self._cut(range(len(pairs)), 0):
            self.reference.score(rows)
        self.facts = {
            "precompute_s": time.perf_counter() - began,
            "packed": self.scorer.packed,
            "reason": self.scorer.reason,
            "lora": lora_of(self.model),
        }

    def gradients(self) -> dict[str, Tensor]:
        parameters, rows = trainable_parameters(self.model, adapter_only=True), range(len(self.chosen))
        for micro in self._cut(rows, 0):
            with self.accelerator.autocast():
                sums = self.objective.sums(micro, estimates={})
            self.accelerator.backward(sums["loss"] / len(rows))
        gradients = {name: p.grad.detach().cpu() for name, p in parameters.items() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return gradients

    def one_pass(self, *, online: bool) -> None:
        """An epoch. online: the reference is forwarded before the policy in every micro-batch, by switching the adapter off."""
        plan = Plan(
            stage="train", label="sigmoid", epochs=1, per_step=self.pairs_per_step, cut=self._cut, micro_batch_tokens=1,
            num_tokens=[c.num_forwarded + r.num_forwarded for c, r in zip(self.chosen, self.rejected, strict=True)],
            checkpoint_every_steps=1_000_000, optimizer=OptimizerConfig(), seed=0,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as keep:
            fit(
                _OnLineObjective(self.objective, self.reference) if online else self.objective, plan=plan, model=self.model,
                parameters=trainable_parameters(self.model, adapter_only=True), accelerator=self.accelerator, keep=Path(keep),
            )  # fmt: skip

    def _cut(self, rows: Sequence[int], _max_tokens: int) -> list[list[int]]:
        """micro_pairs at a time: packed rows of about the same length, padded rows of similar lengths."""
        ordered = sorted(rows, key=lambda row: self.chosen[row].num_forwarded + self.rejected[row].num_forwarded)
        if not self.scorer.packed:
            return [ordered[start : start + self.micro_pairs] for start in range(0, len(ordered), self.micro_pairs)]
        count = -(-len(ordered) // self.micro_pairs)
        return [ordered[start::count] for start in range(count)]


class _OnLineReference:
    """Per-token log-probs under the base, row by row; PairObjective reads the lists."""

    def __init__(
        self, model: Any, scorer: Scorer, accelerator: Any, chosen: Sequence[TokenSequence], rejected: Sequence[TokenSequence]
    ) -> None:
        self.model, self.scorer, self.accelerator = model, scorer, accelerator
        self.sides = (chosen, rejected)
        self.chosen: list[Tensor] = [torch.empty(0)] * len(chosen)
        self.rejected: list[Tensor] = [torch.empty(0)] * len(rejected)

    def score(self, rows: Sequence[int]) -> None:
        sequences = [side[row] for side in self.sides for row in rows]
        with torch.no_grad(), self.model.disable_adapter(), self.accelerator.autocast():
            logps_N = self.scorer(sequences).logps_N
        values = torch.split(logps_N, [len(sequence.completion) for sequence in sequences])
        for index, row in enumerate(rows):
            self.chosen[row], self.rejected[row] = values[index], values[len(rows) + index]


class _OnLineObjective:
    """The objective, with the reference of a micro-batch computed when it is needed."""

    def __init__(self, objective: PairObjective, reference: _OnLineReference) -> None:
        self.objective, self.reference = objective, reference
        self.size, self.estimates, self.metrics = objective.size, objective.estimates, objective.metrics

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, Tensor]:
        self.reference.score(rows)
        return self.objective.sums(rows, estimates=estimates)
