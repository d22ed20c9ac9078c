"""Losses as pure functions: log-probs in, loss per pair out. Shapes: B pairs.

ratio: log π(y|x) - log π_ref(y|x), summed over the completion's tokens, nats.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def sigmoid_loss(chosen_ratio_B: Tensor, rejected_ratio_B: Tensor, *, beta: float) -> Tensor:
    """-log σ(β (Δ_chosen - Δ_rejected)): DPO, eq. 7 of https://arxiv.org/abs/2305.18290"""
    return -functional.logsigmoid(beta * (chosen_ratio_B - rejected_ratio_B))


def length_normalised_nll(logprob_B: Tensor, num_tokens_B: Tensor) -> Tensor:
    """-log π(y|x) / |y|, per sequence: the NLL term of eq. 1 of https://arxiv.org/abs/2404.19733 (theirs covers chain of thought and
    answer of the chosen completion, which here is the whole completion; their 1 / (|x| + |y|) is left out: prompts are not scored)."""
    return -logprob_B / num_tokens_B
