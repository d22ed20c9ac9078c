"""Losses as pure functions: log-probs in, loss per pair (or per example) out. Shapes: B pairs or examples.

Δ: log-ratio, log π(y|x) - log π_ref(y|x), summed over the completion's n tokens, nats. r: the reward of a completion that the loss
implies, beta times its score; m = r_chosen - r_rejected, the margin. Most losses are functions of the two rewards, so `rewards` is
also what training reports. Definitions equal TRL 1.16's of the same name; where they differ from the paper, the line says so.
"""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_loop.config import (
    ApoDownLoss,
    ApoZeroLoss,
    DivergenceLoss,
    ExoPairLoss,
    HingeLoss,
    IpoLoss,
    KtoLoss,
    Loss,
    NcaPairLoss,
    OrpoLoss,
    RobustLoss,
    SigmoidLoss,
    SigmoidNormLoss,
    SimpoLoss,
    SppoHardLoss,
)

MAX_EXPONENT = 80.0
"""e^80 is near the end of fp32; the alpha-divergence is cut there, as TRL cuts it."""
CERTAIN = -torch.finfo(torch.float32).eps
"""Mean log-prob of a completion that fp32 cannot tell from a certain one; its odds would be infinite."""


class Side(NamedTuple):
    """One side of B pairs, chosen or rejected (or B single examples): fp64 [B], but for num_tokens_B."""

    logp_B: Tensor
    """log π(y|x), summed over the completion's tokens."""
    num_tokens_B: Tensor
    log_ratio_B: Tensor | None
    """Δ, each token weighted by the loss's token weight (LD-DPO); None where there is no reference."""
    alignment_B: Tensor | None = None
    """WPO: mean over the tokens of log π(token) - log Σ_v π(v)², without gradient; None where it was not asked for."""


def rewards(loss: Loss, side: Side) -> Tensor:
    """r [B]: the reward of each completion that the loss implies."""
    match loss:
        case SimpoLoss() | OrpoLoss():
            return loss.beta * side.logp_B / side.num_tokens_B  # β log π(y|x) / |y|: eq. 4 of https://arxiv.org/abs/2405.14734
        case IpoLoss() | SigmoidNormLoss():
            return loss.beta * _score(loss, side) / side.num_tokens_B  # β Δ / |y|: https://arxiv.org/abs/2411.15124
        case SigmoidLoss() | RobustLoss() | ExoPairLoss() | HingeLoss():
            return loss.beta * _score(loss, side)
        case NcaPairLoss() | SppoHardLoss() | ApoZeroLoss() | ApoDownLoss() | KtoLoss():
            return loss.beta * _log_ratio(side)  # β Δ: eq. 5 of https://arxiv.org/abs/2305.18290 without its log Z
        case _:
            assert_never(loss)


def loss_per_pair(loss: Loss, chosen: Side, rejected: Side) -> Tensor:
    """The loss of each pair [B], before WPO's weight. Raises TypeError for KTO, whose loss is of single examples: `kto_loss`."""
    chosen_B, rejected_B = rewards(loss, chosen), rewards(loss, rejected)
    margin_B = chosen_B - rejected_B
    match loss:
        case SigmoidLoss() | SigmoidNormLoss():
            return _smoothed(margin_B, loss.label_smoothing)  # -ln σ(m): eq. 7 of https://arxiv.org/abs/2305.18290
        case RobustLoss():
            # [-(1-ε) ln σ(m) + ε ln σ(-m)] / (1-2ε): §3.1 of https://arxiv.org/abs/2403.00409
            flipped = loss.label_smoothing
            return (-(1 - flipped) * logsigmoid(margin_B) + flipped * logsigmoid(-margin_B)) / (1 - 2 * flipped)
        case ExoPairLoss():
            # KL of (σ(m), σ(-m)) to the labels (1-ε, ε): eq. 16 of https://arxiv.org/abs/2402.00856
            log_right, log_wrong = math.log1p(-loss.label_smoothing), math.log(loss.label_smoothing)
            log_win_B, log_lose_B = logsigmoid(margin_B), logsigmoid(-margin_B)
            return log_win_B.exp() * (log_win_B - log_right) + log_lose_B.exp() * (log_lose_B - log_wrong)
        case HingeLoss():
            return torch.relu(1 - margin_B)  # max(0, 1 - m): §2 of https://arxiv.org/abs/2305.10425, on log-ratios
        case IpoLoss():
            # (Δ_c/n_c - Δ_r/n_r - 1/(2β))²: eq. 17 of https://arxiv.org/abs/2310.12036, which has sums where this has means
            return ((margin_B - 0.5) / loss.beta).square()
        case NcaPairLoss():
            # -ln σ(r_c) - ½ ln σ(-r_c) - ½ ln σ(-r_r): §4.1 of https://arxiv.org/abs/2402.05369
            return -logsigmoid(chosen_B) - 0.5 * logsigmoid(-chosen_B) - 0.5 * logsigmoid(-rejected_B)
        case SppoHardLoss():
            # (Δ_c - 1/(2β))² + (Δ_r + 1/(2β))²: eq. 4.7 of https://arxiv.org/abs/2405.00675 with win probabilities 1 and 0
            return ((chosen_B - 0.5) / loss.beta).square() + ((rejected_B + 0.5) / loss.beta).square()
        case ApoZeroLoss():
            return 1 - chosen_B.sigmoid() + rejected_B.sigmoid()  # 1 - σ(r_c) + σ(r_r): eq. 7 of https://arxiv.org/abs/2408.06266
        case ApoDownLoss():
            return chosen_B.sigmoid() + 1 - margin_B.sigmoid()  # σ(r_c) + 1 - σ(m): eq. 8 of https://arxiv.org/abs/2408.06266
        case SimpoLoss():
            target = loss.beta * loss.gamma_beta_ratio
            return _smoothed(margin_B - target, loss.label_smoothing)  # -ln σ(m - γ): eq. 6 of https://arxiv.org/abs/2405.14734
        case OrpoLoss():
            # NLL - λ ln σ(log odds_c - log odds_r): eq. 6 and 7 of https://arxiv.org/abs/2403.07691. The NLL is per sequence and of
            # the completion; TRL's is over prompt and completion, and a mean over the tokens of a micro-batch.
            nll_B = length_normalised_nll(chosen.logp_B, chosen.num_tokens_B)
            return nll_B - loss.beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
        case KtoLoss():
            raise TypeError("KTO's loss is of single examples, not of pairs: kto_loss")
        case _:
            assert_never(loss)


def loss_at_reference(loss: Loss) -> float:
    """The loss of any pair while the policy is the reference, whatever its completions: ln 2 for DPO. For losses with a reference."""
    zero_B = torch.zeros(1, dtype=torch.float64)
    side = Side(logp_B=zero_B, num_tokens_B=torch.ones(1), log_ratio_B=zero_B)
    return float(loss_per_pair(loss, side, side))


def kto_loss(loss: KtoLoss, side: Side, *, desirable_B: Tensor, z0: float) -> Tensor:
    """λ (1 - σ(r - βz0)) of a desirable example, λ (1 - σ(βz0 - r)) of an undesirable one [B]: eq. 7 of https://arxiv.org/abs/2402.01306

    z0: estimate of the KL of the policy to the reference, nats per completion, not negative, without gradient.
    """
    away_B = rewards(loss, side) - loss.beta * z0
    return torch.where(
        desirable_B, loss.desirable_weight * (-away_B).sigmoid(), loss.undesirable_weight * away_B.sigmoid()
    )  # 1 - σ(a) = σ(-a)


def wpo_weight(chosen: Side, rejected: Side) -> Tensor:
    """How likely a pair's two completions are under the policy of now [B]: eq. 2 of https://arxiv.org/abs/2406.11827, length-normalised
    and divided by the expected probability of a token that the policy draws (its "sampled alignment")."""
    assert chosen.alignment_B is not None
    assert rejected.alignment_B is not None
    return (chosen.alignment_B + rejected.alignment_B).exp()


def length_normalised_nll(logp_B: Tensor, num_tokens_B: Tensor) -> Tensor:
    """-log π(y|x) / |y|, per sequence: the NLL term of eq. 1 of https://arxiv.org/abs/2404.19733 (theirs covers chain of thought and
    answer of the chosen completion, which here is the whole completion; their 1 / (|x| + |y|) is left out: prompts are not scored)."""
    return -logp_B / num_tokens_B


def ld_token_weights(alpha: float, num_chosen: int, num_rejected: int) -> tuple[Tensor, Tensor]:
    """Weights of the tokens of chosen [num_chosen] and rejected [num_rejected]: 1 up to the shorter one's length, alpha beyond it.

    LD-DPO, https://arxiv.org/abs/2409.06411; applied to policy and reference alike, as TRL does.
    """
    shared = min(num_chosen, num_rejected)
    chosen, rejected = torch.full((num_chosen,), alpha), torch.full((num_rejected,), alpha)
    chosen[:shared] = rejected[:shared] = 1.0
    return chosen, rejected


def _smoothed(margin_B: Tensor, label_smoothing: float) -> Tensor:
    """-(1-ε) ln σ(m) - ε ln σ(-m): cDPO, https://ericmitchell.ai/cdpo.pdf (TRL has no smoothing for `sigmoid`)."""
    loss_B = -(1 - label_smoothing) * logsigmoid(margin_B)
    return loss_B - label_smoothing * logsigmoid(-margin_B) if label_smoothing else loss_B


def _score(loss: DivergenceLoss, side: Side) -> Tensor:
    """f'(π / π_ref), up to a constant that cancels, with u = e^Δ: table 1 of https://arxiv.org/abs/2309.16240"""
    ratio_B = _log_ratio(side)
    match loss.f_divergence:
        case "reverse_kl":
            return ratio_B  # ln u
        case "forward_kl":
            return 1 - (-ratio_B).exp()  # 1 - 1/u
        case "js_divergence":
            return math.log(2) + logsigmoid(ratio_B)  # ln(2u / (1 + u))
        case "alpha_divergence":
            exponent = loss.f_alpha - 1
            return (exponent * ratio_B).clamp(max=MAX_EXPONENT).expm1() / exponent  # (u^(α-1) - 1) / (α-1)
        case _:
            assert_never(loss.f_divergence)


def _log_ratio(side: Side) -> Tensor:
    assert side.log_ratio_B is not None, "this loss needs a reference"
    return side.log_ratio_B


def _log_odds(side: Side) -> Tensor:
    """ln(p / (1-p)) of the mean probability of a token, p = π(y|x)^(1/|y|): eq. 3 and 4 of https://arxiv.org/abs/2403.07691"""
    logp_B = (side.logp_B / side.num_tokens_B).clamp(max=CERTAIN)
    return logp_B - (-logp_B.expm1()).log()
