"""The preference losses, one config each; names are TRL's where TRL has the loss. What they compute is in dpo_loop/training/objectives/losses.py."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dpo_loop.config.base import Fraction, Settings

Smoothing = Annotated[float, Field(ge=0, lt=0.5, description="share of labels that are believed to be wrong")]
Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]


class PairLoss(Settings):
    """Base of the losses over a pair's log-ratios to the reference."""

    beta: float = Field(0.1, gt=0)
    """Strength of the pull towards the reference."""
    ld_alpha: Fraction | None = None
    """LD-DPO (arXiv 2409.06411): weight of the tokens beyond the shorter completion's length; None weighs all alike."""
    wpo: bool = False
    """WPO (arXiv 2406.11827): a pair counts as much as its completions are likely under the policy of now."""


class DivergenceLoss(PairLoss):
    """Base of the losses of a difference of two ratios, for which the divergence can be another than the reverse KL (arXiv 2309.16240)."""

    f_divergence: Divergence = "reverse_kl"
    f_alpha: float = Field(0.5, gt=0, lt=1)
    """Of the alpha-divergence."""


class SigmoidLoss(DivergenceLoss):
    """DPO (arXiv 2305.18290 eq. 7); with label_smoothing, cDPO."""

    kind: Literal["sigmoid"]
    label_smoothing: Smoothing = 0.0


class SigmoidNormLoss(DivergenceLoss):
    """Length-normalised DPO (Tulu 3, arXiv 2411.15124): log-ratios per token, hence another beta."""

    kind: Literal["sigmoid_norm"]
    beta: float = Field(5.0, gt=0)
    label_smoothing: Smoothing = 0.0


class RobustLoss(DivergenceLoss):
    """Robust DPO (arXiv 2403.00409): unbiased for labels flipped at the rate label_smoothing."""

    kind: Literal["robust"]
    label_smoothing: Smoothing = 0.1


class ExoPairLoss(DivergenceLoss):
    """EXO for pairs (arXiv 2402.00856)."""

    kind: Literal["exo_pair"]
    label_smoothing: float = Field(1e-3, gt=0, lt=0.5)


class HingeLoss(DivergenceLoss):
    """Hinge on the margin (SLiC, arXiv 2305.10425, with reference)."""

    kind: Literal["hinge"]


class IpoLoss(DivergenceLoss):
    """IPO (arXiv 2310.12036) on mean log-ratios per token, as TRL has it; 1 / (2 beta) is the margin aimed at."""

    kind: Literal["ipo"]


class NcaPairLoss(PairLoss):
    """NCA for pairs (arXiv 2402.05369)."""

    kind: Literal["nca_pair"]


class SppoHardLoss(PairLoss):
    """SPPO with win probabilities of 1 and 0 (arXiv 2405.00675)."""

    kind: Literal["sppo_hard"]
    beta: float = Field(1e-3, gt=0)


class ApoZeroLoss(PairLoss):
    """APO-zero (arXiv 2408.06266): chosen up, rejected down."""

    kind: Literal["apo_zero"]


class ApoDownLoss(PairLoss):
    """APO-down (arXiv 2408.06266): both down, rejected more; for a policy that is better than its chosen answers."""

    kind: Literal["apo_down"]


class SimpoLoss(Settings):
    """SimPO (arXiv 2405.14734): mean log-probs per token, no reference, a margin `gamma_beta_ratio` of beta."""

    kind: Literal["simpo"]
    beta: float = Field(2.0, gt=0)
    gamma_beta_ratio: float = Field(0.5, ge=0)
    label_smoothing: Smoothing = 0.0


class OrpoLoss(Settings):
    """ORPO (arXiv 2403.07691): NLL of chosen plus beta times the odds-ratio loss, no reference."""

    kind: Literal["orpo"]
    beta: float = Field(0.1, gt=0)


class KtoLoss(Settings):
    """KTO (arXiv 2402.01306): every completion is thumbs up or thumbs down; pairs are split into one of each."""

    kind: Literal["kto"]
    beta: float = Field(0.1, gt=0)
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)


ReferenceFreeLoss = SimpoLoss | OrpoLoss
Loss = Annotated[
    SigmoidLoss
    | SigmoidNormLoss
    | RobustLoss
    | ExoPairLoss
    | HingeLoss
    | IpoLoss
    | NcaPairLoss
    | SppoHardLoss
    | ApoZeroLoss
    | ApoDownLoss
    | SimpoLoss
    | OrpoLoss
    | KtoLoss,
    Field(discriminator="kind"),
]
