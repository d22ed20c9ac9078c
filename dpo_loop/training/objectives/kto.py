"""KTO as an objective of the training loop: single examples with a thumb up or down instead of pairs (https://arxiv.org/abs/2402.01306).

Rows are examples. Pairs are split into a thumb up for what was chosen and a thumb down for what was rejected; unpaired feedback follows.

The loss compares an example's reward with z0, an estimate of the KL of the policy to the reference: the mean log-ratio of completions
that belong to other prompts, never below zero and without gradient. Here it is a mean over the whole optimizer step, so that neither
micro-batches nor processes change the gradient; the paper's and TRL's are over a micro-batch. Which completion goes with which
prompt is fixed before training (`mismatched`), so that their reference log-probs are computed once like all others. Where all
examples have the same prompt there is nothing to estimate from, and z0 is 0.

Shapes: B examples, N completion tokens of all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_loop.config import KtoLoss
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.sequences import TokenSequence, sum_by_sequence
from dpo_loop.training.objectives.losses import Side, kto_loss, length_normalised_nll, rewards
from dpo_loop.training.objectives.preferences import check_start
from dpo_loop.types import content_id


class Example(NamedTuple):
    """desirable: thumb up."""

    sequence: TokenSequence
    desirable: bool


def split_pairs(chosen: Sequence[TokenSequence], rejected: Sequence[TokenSequence]) -> list[Example]:
    """Pair i becomes examples 2i (chosen) and 2i + 1 (rejected)."""
    pairs = zip(chosen, rejected, strict=True)
    return [example for good, bad in pairs for example in (Example(good, True), Example(bad, False))]


def mismatched(examples: Sequence[Example], *, max_length: int) -> list[TokenSequence]:
    """Each example's prompt with the completion of an example of another prompt; empty if there is only one prompt.

    A pure function of what the examples are, whatever their order. Every completion is used once, unless one prompt has more than half
    of the examples: then the others' are used again. A completion is cut where it would go past max_length tokens, as TRL cuts it.
    """
    rows_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for row in sorted(range(len(examples)), key=lambda row: content_id(examples[row].sequence)):
        rows_of[examples[row].sequence.prompt].append(row)
    if len(rows_of) < 2:
        return []
    groups = sorted(rows_of.values(), key=len, reverse=True)
    order = [row for group in groups for row in group]
    # Prompts stand in blocks, the largest first: a shift by the largest block leads out of every block, unless it wraps around into
    # the largest one; what would, goes around the others instead.
    shift, num_others = len(groups[0]), len(order) - len(groups[0])
    found: list[TokenSequence] = [examples[0].sequence] * len(order)
    for place, row in enumerate(order):
        partner = (place + shift) % len(order)
        if place < shift and partner < shift:
            partner = shift + place % num_others
        prompt, completion = examples[row].sequence.prompt, examples[order[partner]].sequence.completion
        found[row] = TokenSequence(prompt, completion[: max(1, max_length - len(prompt))])
    return found


class KtoObjective:
    """Mean loss per example; row i is example i.

    reference: per-token log-probs of each example's completion. mismatched, mismatched_reference: of `mismatched`, both empty if there
    is only one prompt. nll_weight: of the negative log-likelihood per token of desirable examples. start_tolerance: as of pairs.
    """

    def __init__(
        self,
        scorer: Scorer,
        examples: Sequence[Example],
        *,
        reference: Sequence[Tensor],
        mismatched: Sequence[TokenSequence],
        mismatched_reference: Sequence[Tensor],
        loss: KtoLoss,
        nll_weight: float,
        start_tolerance: float | None,
    ) -> None:
        assert len(examples) == len(reference)
        assert len(mismatched) == len(mismatched_reference)
        assert len(mismatched) in (0, len(examples))
        self.scorer, self.examples, self.reference = scorer, examples, reference
        self.mismatched, self.mismatched_reference = mismatched, mismatched_reference
        self.loss, self.nll_weight, self.start_tolerance = loss, nll_weight, start_tolerance

    def size(self, rows: Sequence[int]) -> int:
        return len(rows)

    def estimates(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Summed log-ratios of the mismatched sequences of these rows, and how many there are."""
        if not self.mismatched:
            return {}
        sequences = [self.mismatched[row] for row in rows]
        with torch.no_grad():
            change_N = self.scorer(sequences).logps_N - self._on_device([self.mismatched_reference[row] for row in rows])
        return {"mismatched_ratio": change_N.double().sum(), "mismatched": torch.tensor(len(rows), device=change_N.device)}

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, Tensor]:
        """Over one micro-batch. estimates: of `estimates`, over the whole step."""
        sequences = [self.examples[row].sequence for row in rows]
        device = self.scorer.device
        desirable_B = torch.tensor([self.examples[row].desirable for row in rows], device=device)
        num_tokens_B = torch.tensor([len(sequence.completion) for sequence in sequences], device=device)
        logps_N = self.scorer(sequences).logps_N
        # Token by token before summing: sums of a long completion are too large for fp32 to keep their difference exact.
        change_N = logps_N - self._on_device([self.reference[row] for row in rows])
        change_B = sum_by_sequence(change_N, sequences)
        side = Side(logp_B=sum_by_sequence(logps_N, sequences), num_tokens_B=num_tokens_B, log_ratio_B=change_B)
        # z0 of eq. 6 of https://arxiv.org/abs/2402.01306
        z0 = max(0.0, estimates["mismatched_ratio"] / estimates["mismatched"]) if self.mismatched else 0.0
        preference_B = kto_loss(self.loss, side, desirable_B=desirable_B, z0=z0)
        nll_B = length_normalised_nll(side.logp_B, num_tokens_B) * desirable_B
        loss_B = preference_B + self.nll_weight * nll_B if self.nll_weight else preference_B
        reward_B = rewards(self.loss, side)
        figures = {
            "preference": preference_B,
            "nll": nll_B,
            "chosen_reward": reward_B * desirable_B,
            "rejected_reward": reward_B * ~desirable_B,
            "correct": (change_B > z0) == desirable_B,
            "chosen_change": change_B * desirable_B,
            "rejected_change": change_B * ~desirable_B,
            "kl": change_N.exp() - 1 - change_N,
            "moved": change_N.abs(),
            "falling": (change_B < 0) & desirable_B,
            "z0": torch.full_like(change_B, z0),
        }
        return {"loss": loss_B.sum(), **{name: values.detach().double().sum() for name, values in figures.items()}}

    def _on_device(self, references: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(references)).to(self.scorer.device)

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        """The figures of pairs, chosen_* over desirable and rejected_* over undesirable examples, each only where the step has some.

        accuracy: share of the examples on their side of z0. margin: difference of the mean rewards. z0: the KL estimate, nats per
        completion; kl is per token and on the examples' own completions.
        """
        desirable = [len(e.sequence.completion) for e in (self.examples[row] for row in rows) if e.desirable]
        undesirable = [len(e.sequence.completion) for e in (self.examples[row] for row in rows) if not e.desirable]
        num_tokens = sum(desirable) + sum(undesirable)
        if step == 0 and self.start_tolerance is not None:
            known = self.loss.desirable_weight * len(desirable) + self.loss.undesirable_weight * len(undesirable)
            expected = known / 2 / len(rows)  # λ (1 - σ(0))
            check_start(sums["preference"] / len(rows), expected, moved=sums["moved"] / num_tokens, tolerance=self.start_tolerance)
        figures = {"loss": sums["loss"] / len(rows)}
        if desirable:
            figures |= {
                "nll": sums["nll"] / len(desirable),
                "chosen_reward": sums["chosen_reward"] / len(desirable),
                "chosen_logprob_change": sums["chosen_change"] / sum(desirable),
                "falling": sums["falling"] / len(desirable),
            }
        if undesirable:
            figures |= {
                "rejected_reward": sums["rejected_reward"] / len(undesirable),
                "rejected_logprob_change": sums["rejected_change"] / sum(undesirable),
            }
        if desirable and undesirable:
            figures["margin"] = figures["chosen_reward"] - figures["rejected_reward"]
        return {
            **figures,
            "accuracy": sums["correct"] / len(rows),
            "kl": sums["kl"] / num_tokens,
            "z0": sums["z0"] / len(rows),
            "examples": len(rows),
        }
