"""Preference pairs as an objective of the training loop: sigmoid DPO on sampled token ids, with its self-check and its figures.

Shapes: B pairs, N completion tokens of the chosen, then of the rejected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_loop.config import TrainingConfig
from dpo_loop.errors import TrainingDivergedError
from dpo_loop.training.logprobs import completion_logprobs
from dpo_loop.training.losses import length_normalised_nll, sigmoid_loss
from dpo_loop.training.sequences import TokenSequence, sum_by_sequence
from dpo_loop.types import PreferencePair


def sequences_of(pairs: Sequence[PreferencePair]) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(chosen, rejected) as sampled: they carry their end-of-turn token already if the sample ended by itself."""
    chosen = [TokenSequence(pair.prompt_token_ids, pair.chosen_token_ids) for pair in pairs]
    return chosen, [TokenSequence(pair.prompt_token_ids, pair.rejected_token_ids) for pair in pairs]


class DpoObjective:
    """chosen_reference, rejected_reference: per-token log-probs of each completion. start_tolerance: set iff the policy starts at the
    reference; then the first step must find loss = ln 2 and the same log-probs to within it (nats per token)."""

    def __init__(
        self,
        model: Any,
        chosen: Sequence[TokenSequence],
        rejected: Sequence[TokenSequence],
        *,
        chosen_reference: Sequence[Tensor],
        rejected_reference: Sequence[Tensor],
        config: TrainingConfig,
        device: torch.device,
        start_tolerance: float | None,
    ) -> None:
        self.model, self.config, self.device = model, config, device
        self.chosen, self.rejected = chosen, rejected
        self.chosen_reference, self.rejected_reference = chosen_reference, rejected_reference
        self.start_tolerance = start_tolerance

    def size(self, rows: Sequence[int]) -> int:
        return len(rows)

    def sums(self, rows: Sequence[int]) -> dict[str, Tensor]:
        sequences = [self.chosen[row] for row in rows] + [self.rejected[row] for row in rows]
        reference_N = torch.cat([self.chosen_reference[row] for row in rows] + [self.rejected_reference[row] for row in rows])
        logps_N = completion_logprobs(self.model, sequences, device=self.device)
        # Token by token before summing: sums of a long completion are too large for fp32 to keep their difference exact.
        change_N = logps_N - reference_N.to(self.device)
        chosen_B, rejected_B = sum_by_sequence(change_N, sequences).chunk(2)
        preference = sigmoid_loss(chosen_B, rejected_B, beta=self.config.loss.beta).sum()
        num_chosen_tokens_B = torch.tensor([len(self.chosen[row].completion) for row in rows], device=self.device)
        chosen_logprob_B = sum_by_sequence(logps_N, sequences)[: len(rows)]
        nll = length_normalised_nll(chosen_logprob_B, num_chosen_tokens_B).sum()
        loss = preference + self.config.nll_weight * nll if self.config.nll_weight else preference
        figures = {
            "preference": preference,
            "nll": nll,
            "chosen": chosen_B.sum(),
            "rejected": rejected_B.sum(),
            "correct": (chosen_B > rejected_B).sum(),
            # Both completions were sampled from the policy that generated; k3 of http://joschu.net/blog/kl-approx.html
            "kl": (change_N.exp() - 1 - change_N).sum(),
            "moved": change_N.abs().sum(),
        }
        return {"loss": loss, **{name: value.detach() for name, value in figures.items()}}

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        """Means over the pairs of one step; *_change and kl per token. kl estimates KL(reference ‖ policy) on the pairs' own completions:
        a sample chosen by the judge, so a trend to watch, not the KL of the policy."""
        num_pairs, beta = len(rows), self.config.loss.beta
        num_chosen = sum(len(self.chosen[row].completion) for row in rows)
        num_rejected = sum(len(self.rejected[row].completion) for row in rows)
        if step == 0 and self.start_tolerance is not None:
            self._check_start(sums["preference"] / num_pairs, sums["moved"] / (num_chosen + num_rejected), self.start_tolerance)
        return {
            "loss": sums["loss"] / num_pairs,
            "nll": sums["nll"] / num_pairs,
            "chosen_reward": beta * sums["chosen"] / num_pairs,
            "rejected_reward": beta * sums["rejected"] / num_pairs,
            "accuracy": sums["correct"] / num_pairs,
            "margin": beta * (sums["chosen"] - sums["rejected"]) / num_pairs,
            "chosen_logprob_change": sums["chosen"] / num_chosen,
            "rejected_logprob_change": sums["rejected"] / num_rejected,
            "kl": sums["kl"] / (num_chosen + num_rejected),
            "pairs": num_pairs,
        }

    def _check_start(self, loss: float, moved: float, tolerance: float) -> None:
        if abs(loss - math.log(2)) > tolerance or moved > tolerance:
            raise TrainingDivergedError(
                f"the self-check of the first step failed: the policy is the reference, so the loss must be ln 2 = {math.log(2):.4f} and no log-prob "
                f"may differ, but the loss is {loss:.4f} and log-probs differ by {moved:.2g} nats per token (allowed: {tolerance:g}). The "
                "reference log-probs or the adapter are not those of the policy; nothing was trained."
            )
