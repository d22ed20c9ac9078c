"""Preference pairs as an objective of the training loop: any loss over sampled token ids, with its self-check and its figures.

Shapes: B pairs, N completion tokens of the chosen, then of the rejected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dpo_loop.config import Loss
from dpo_loop.config.losses import PairLoss
from dpo_loop.errors import TrainingDivergedError
from dpo_loop.training.forward.logprobs import Scorer, TokenScores
from dpo_loop.training.forward.sequences import TokenSequence, sum_by_sequence
from dpo_loop.training.objectives.losses import (
    Side,
    ld_token_weights,
    length_normalised_nll,
    loss_at_reference,
    loss_per_pair,
    rewards,
    wpo_weight,
)
from dpo_loop.types import PreferencePair


def sequences_of(pairs: Sequence[PreferencePair]) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """(chosen, rejected) as sampled: they carry their end-of-turn token already if the sample ended by itself."""
    chosen = [TokenSequence(pair.prompt_token_ids, pair.chosen_token_ids) for pair in pairs]
    return chosen, [TokenSequence(pair.prompt_token_ids, pair.rejected_token_ids) for pair in pairs]


class PairObjective:
    """Mean loss per pair; row i is pair i.

    chosen_reference, rejected_reference: per-token log-probs of each completion, fp32 on any device; None iff the loss is
    reference-free. nll_weight: of the negative log-likelihood of chosen per token, per sequence. start_tolerance: set iff the policy
    starts at the reference; then the first step must find the loss that any policy has there (ln 2 for DPO) and the same log-probs
    to within it (nats per token).
    """

    def __init__(
        self,
        scorer: Scorer,
        chosen: Sequence[TokenSequence],
        rejected: Sequence[TokenSequence],
        *,
        chosen_reference: Sequence[Tensor] | None,
        rejected_reference: Sequence[Tensor] | None,
        loss: Loss,
        nll_weight: float,
        start_tolerance: float | None,
    ) -> None:
        self.scorer, self.chosen, self.rejected = scorer, chosen, rejected
        self.reference = None
        if isinstance(loss, PairLoss):
            assert chosen_reference is not None, f"the loss {loss.kind} needs reference log-probs"
            assert rejected_reference is not None, f"the loss {loss.kind} needs reference log-probs"
            self.reference = (chosen_reference, rejected_reference)
        self.loss, self.nll_weight, self.start_tolerance = loss, nll_weight, start_tolerance

    def size(self, rows: Sequence[int]) -> int:
        return len(rows)

    def estimates(self, rows: Sequence[int]) -> dict[str, Tensor]:  # noqa: ARG002
        """No loss of pairs needs to know anything of the rest of its step."""
        return {}

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, Tensor]:  # noqa: ARG002
        """Over one micro-batch. `preference` is the loss without its NLL term and without WPO's weights."""
        sequences = [self.chosen[row] for row in rows] + [self.rejected[row] for row in rows]
        weighted = isinstance(self.loss, PairLoss) and self.loss.wpo
        scores = self.scorer(sequences, with_collisions=weighted)
        # Token by token before summing: sums of a long completion are too large for fp32 to keep their difference exact.
        change_N = None if self.reference is None else scores.logps_N - self._reference_logps(rows)
        chosen, rejected = self._sides(rows, sequences, scores, change_N)
        preference_B = loss_per_pair(self.loss, chosen, rejected)
        weight_B = wpo_weight(chosen, rejected) if weighted else torch.ones_like(preference_B)
        nll_B = length_normalised_nll(chosen.logp_B, chosen.num_tokens_B)
        loss_B = weight_B * preference_B + (self.nll_weight * nll_B if self.nll_weight else 0)
        chosen_reward_B, rejected_reward_B = rewards(self.loss, chosen), rewards(self.loss, rejected)
        figures = {
            "preference": preference_B,
            "nll": nll_B,
            "chosen_reward": chosen_reward_B,
            "rejected_reward": rejected_reward_B,
            "correct": chosen_reward_B > rejected_reward_B,
        }
        if change_N is not None:
            chosen_change_B, rejected_change_B = sum_by_sequence(change_N, sequences).chunk(2)
            figures |= {
                "chosen_change": chosen_change_B,
                "rejected_change": rejected_change_B,
                # Both completions were sampled from the policy that generated; k3 of http://joschu.net/blog/kl-approx.html
                "kl": change_N.exp() - 1 - change_N,
                "moved": change_N.abs(),
                "falling": chosen_change_B < 0,
            }
        return {"loss": loss_B.sum(), **{name: values.detach().double().sum() for name, values in figures.items()}}

    def _reference_logps(self, rows: Sequence[int]) -> Tensor:
        assert self.reference is not None
        return torch.cat([side[row] for side in self.reference for row in rows]).to(self.scorer.device)

    def _sides(
        self, rows: Sequence[int], sequences: Sequence[TokenSequence], scores: TokenScores, change_N: Tensor | None
    ) -> tuple[Side, Side]:
        num_tokens_2B = torch.tensor([len(sequence.completion) for sequence in sequences], device=self.scorer.device)
        logp_2B = sum_by_sequence(scores.logps_N, sequences)
        ratio_2B = alignment_2B = None
        if change_N is not None:
            ratio_2B = sum_by_sequence(change_N * self._token_weights(rows), sequences)
        if scores.log_collisions_N is not None:
            alignment_2B = sum_by_sequence(scores.logps_N.detach() - scores.log_collisions_N, sequences) / num_tokens_2B

        def side(half: slice) -> Side:
            return Side(
                logp_B=logp_2B[half],
                num_tokens_B=num_tokens_2B[half],
                log_ratio_B=None if ratio_2B is None else ratio_2B[half],
                alignment_B=None if alignment_2B is None else alignment_2B[half],
            )

        return side(slice(None, len(rows))), side(slice(len(rows), None))

    def _token_weights(self, rows: Sequence[int]) -> Tensor | float:
        if not isinstance(self.loss, PairLoss) or self.loss.ld_alpha is None:
            return 1.0
        lengths = [(len(self.chosen[row].completion), len(self.rejected[row].completion)) for row in rows]
        pairs = [ld_token_weights(self.loss.ld_alpha, *each) for each in lengths]
        return torch.cat([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]).to(self.scorer.device)

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        """Means over the pairs of one step; *_change and kl per token. Rewards are those that the loss implies: losses.rewards.

        kl estimates KL(reference ‖ policy) on the pairs' own completions: a sample chosen by the judge, so a trend to watch, not the
        KL of the policy. falling: share of the pairs whose chosen completion is less likely than under the reference. A
        reference-free loss has neither these nor *_change.
        """
        num_pairs = len(rows)
        figures = {
            "loss": sums["loss"] / num_pairs,
            "nll": sums["nll"] / num_pairs,
            "chosen_reward": sums["chosen_reward"] / num_pairs,
            "rejected_reward": sums["rejected_reward"] / num_pairs,
            "accuracy": sums["correct"] / num_pairs,
            "margin": (sums["chosen_reward"] - sums["rejected_reward"]) / num_pairs,
        }
        if self.reference is not None:
            num_chosen = sum(len(self.chosen[row].completion) for row in rows)
            num_rejected = sum(len(self.rejected[row].completion) for row in rows)
            if step == 0 and self.start_tolerance is not None:
                moved = sums["moved"] / (num_chosen + num_rejected)
                check_start(
                    sums["preference"] / num_pairs, loss_at_reference(self.loss), moved=moved, tolerance=self.start_tolerance
                )
            figures |= {
                "chosen_logprob_change": sums["chosen_change"] / num_chosen,
                "rejected_logprob_change": sums["rejected_change"] / num_rejected,
                "kl": sums["kl"] / (num_chosen + num_rejected),
                "falling": sums["falling"] / num_pairs,
            }
        return {**figures, "pairs": num_pairs}


def check_start(loss: float, expected: float, *, moved: float, tolerance: float) -> None:
    """The first step of a policy that starts at its reference. loss: per example; moved: mean |log π - log π_ref|, nats per token.

    Raises TrainingDivergedError unless both are what they must be.
    """
    # SPPO's and IPO's losses are large numbers there (1 / (2 beta²)), so the tolerance of the loss is relative above 1.
    if not (abs(loss - expected) <= tolerance * max(1.0, expected) and moved <= tolerance):
        known = "ln 2 = 0.6931" if f"{expected:.4f}" == "0.6931" else f"{expected:.4f}"
        raise TrainingDivergedError(
            f"the self-check of the first step failed: the policy is the reference, so the loss must be {known} and no log-prob "
            f"may differ, but the loss is {loss:.4f} and log-probs differ by {moved:.2g} nats per token (allowed: {tolerance:g}). The "
            "reference log-probs or the adapter are not those of the policy; nothing was trained."
        )
