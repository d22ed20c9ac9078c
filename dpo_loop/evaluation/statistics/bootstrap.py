"""Intervals of figures that are no counts (perplexity ratios, lengths, scores 0..1), by resampling prompts.

BCa: Efron (1987), "Better bootstrap confidence intervals", JASA 82:171-185. Where resampling shows no spread, or the correction is not
defined, there is no interval: a width of zero would claim certainty (garak#2033), and scipy's own bootstrap gives [nan, nan] there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

Array = np.ndarray[Any, np.dtype[np.float64]]
NUM_RESAMPLES = 2_000


def bca_interval(
    values: Sequence[Sequence[float]],
    statistic: Callable[[Array], Array],
    *,
    alpha: float,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float] | None:
    """One-sided limits at 1 - alpha each, of a statistic of paired columns.

    values: one sequence per column, with an entry per prompt; all finite. statistic(samples_RCN) -> one figure for each of R samples of C
    columns and N prompts. None where there is no interval: fewer than two prompts, no spread, or a figure that is not finite.
    """
    columns_CN = np.asarray(values, dtype=float)
    num = columns_CN.shape[1]
    if num < 2 or not np.isfinite(columns_CN).all():
        return None
    rng = np.random.default_rng(seed)
    observed = float(statistic(columns_CN[None])[0])
    picked_RN = rng.integers(num, size=(num_resamples, num))
    drawn_R = statistic(np.moveaxis(columns_CN[:, picked_RN], 0, 1))
    left_out_NC = np.stack([np.delete(columns_CN, index, axis=1) for index in range(num)])
    jackknife_N = statistic(left_out_NC)
    if not (math.isfinite(observed) and np.isfinite(drawn_R).all() and np.isfinite(jackknife_N).all()) or np.ptp(drawn_R) == 0:
        return None
    below = (np.count_nonzero(drawn_R < observed) + 0.5 * np.count_nonzero(drawn_R == observed)) / num_resamples
    pulls_N = jackknife_N.mean() - jackknife_N
    spread = float((pulls_N**2).sum())
    if not 0 < below < 1 or spread == 0:
        return None
    bias, acceleration = float(ndtri(below)), float((pulls_N**3).sum() / (6 * spread**1.5))
    levels = []
    for z in (float(ndtri(alpha)), float(ndtri(1 - alpha))):
        stretched = 1 - acceleration * (bias + z)
        if stretched <= 0:
            return None
        levels.append(float(ndtr(bias + (bias + z) / stretched)))
    low, high = (float(limit) for limit in np.quantile(drawn_R, levels))
    return (low, high) if low < high else None


def mean(samples_RCN: Array) -> Array:
    """Of the first column."""
    return np.asarray(samples_RCN[:, 0].mean(axis=1))


def mean_difference(samples_RCN: Array) -> Array:
    """First column less the second."""
    return np.asarray((samples_RCN[:, 0] - samples_RCN[:, 1]).mean(axis=1))


def ratio_of_geometric_means(samples_RCN: Array) -> Array:
    """Of positive figures such as perplexities: first column over the second."""
    return np.asarray(np.exp((np.log(samples_RCN[:, 0]) - np.log(samples_RCN[:, 1])).mean(axis=1)))
