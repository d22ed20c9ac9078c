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
_FIGURES_AT_ONCE = 1_000_000
"""Of resamples, in memory: 8 MB."""


def bca_interval(
    values: Sequence[Sequence[float]] | Array,
    statistic: Callable[[Array], Array],
    *,
    alpha: float,
    seed: int = 0,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float] | None:
    """One-sided limits at 1 - alpha each, of a statistic of the means of paired columns: a mean, a difference or a ratio of means.

    values: one sequence per column, with an entry per prompt; all finite. statistic(means_RC) -> one figure for each of R samples, from the means
    of their C columns. None where there is no interval: fewer than two prompts, no spread, or a figure that is not finite. Time grows with
    prompts times resamples, memory with prompts.
    """
    columns_CN = np.asarray(values, dtype=float)
    num = columns_CN.shape[1]
    if num < 2 or not np.isfinite(columns_CN).all():
        return None
    observed = float(statistic(columns_CN.mean(axis=1)[None])[0])
    drawn_R = statistic(_resampled_means(columns_CN, num_resamples, np.random.default_rng(seed)))
    jackknife_N = statistic((columns_CN.sum(axis=1, keepdims=True) - columns_CN).T / (num - 1))
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


def _resampled_means(columns_CN: Array, num_resamples: int, rng: np.random.Generator) -> Array:
    """means_RC"""
    num_columns, num = columns_CN.shape
    at_once = max(1, _FIGURES_AT_ONCE // (num_columns * num))
    sizes = (min(at_once, num_resamples - begin) for begin in range(0, num_resamples, at_once))
    return np.concatenate([columns_CN[:, rng.integers(num, size=(size, num))].mean(axis=2).T for size in sizes])
