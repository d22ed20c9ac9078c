"""Win rates at equal length: how often the candidate would win if its answers were as long as the reference's.

The light form of length-controlled AlpacaEval (Dubois et al. 2024, arXiv 2404.04475): logistic regression of the score (1, 0.5, 0) on
tanh(difference in length / its spread); the intercept is the win rate at no difference. Left out: the terms of the instruction's difficulty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit

Array = np.ndarray[Any, np.dtype[np.float64]]
FEWEST = 20
"""Comparisons below which a slope is not to be had."""
MOST_STEPS = 50
RIDGE = 1e-3
"""Of the slope, in units of one comparison: keeps it finite where length and winning go together without exception."""


class LengthControlled(NamedTuple):
    """win_rate: at equal length. low, high: one-sided limits. slope: of the log-odds on tanh(difference / spread); above 0 length wins."""

    win_rate: float
    low: float
    high: float
    slope: float


def length_controlled(scores: Sequence[float], more: Sequence[float], *, alpha: float, seed: int = 0) -> LengthControlled | None:
    """scores: 1 win, 0.5 tie, 0 loss. more: length of the candidate's answer less the reference's, in any unit.

    Limits by resampling prompts (percentiles of the log-odds, which are far from degenerate where there is an interval at all). None where there
    are too few comparisons, one outcome only, or no difference in length: there is nothing to control then.
    """
    y_N, d_N = np.asarray(scores, dtype=float), np.asarray(more, dtype=float)
    spread = float(np.sqrt((d_N**2).mean())) if len(d_N) else 0.0
    if len(y_N) < FEWEST or spread == 0 or np.ptp(y_N) == 0:
        return None
    x_N = np.tanh(d_N / spread)
    intercept, slope = _fit(np.ones((1, len(y_N))), x_N, y_N)[0]
    weights_RN = np.random.default_rng(seed).multinomial(len(y_N), np.full(len(y_N), 1 / len(y_N)), size=1_000).astype(float)
    drawn_R = _fit(weights_RN, x_N, y_N)[:, 0]
    low, high = (float(limit) for limit in expit(np.quantile(drawn_R, [alpha, 1 - alpha])))
    return LengthControlled(float(expit(intercept)), low, high, float(slope))


def _fit(weights_RN: Array, x_N: Array, y_N: Array) -> Array:
    """(intercept, slope) per row of weights, by Newton's method on the weighted log-likelihood with a ridge on both."""
    beta_R2 = np.zeros((len(weights_RN), 2))
    for _ in range(MOST_STEPS):
        p_RN = expit(beta_R2[:, :1] + beta_R2[:, 1:] * x_N)
        pull_RN, curve_RN = weights_RN * (y_N - p_RN), weights_RN * p_RN * (1 - p_RN)
        g0, g1 = pull_RN.sum(1) - RIDGE * beta_R2[:, 0], (pull_RN * x_N).sum(1) - RIDGE * beta_R2[:, 1]
        h00, h01, h11 = curve_RN.sum(1) + RIDGE, (curve_RN * x_N).sum(1), (curve_RN * x_N**2).sum(1) + RIDGE
        det = h00 * h11 - h01**2
        step_R2 = np.stack([(h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det], axis=1)
        beta_R2 += np.clip(step_R2, -2.0, 2.0)
        if np.abs(step_R2).max() < 1e-8:
            break
    return beta_R2
