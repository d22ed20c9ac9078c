"""What a paired evaluation of this size can see: computed from the trinomial of its outcomes, not simulated.

churn: share of prompts on which an equally good candidate becomes worse, and as large a share on which it becomes better; sampling alone
causes some (an A/A run measures it).
"""

from __future__ import annotations

import math
from functools import cache

from scipy.special import betainc, gammaln

from dpo_loop.evaluation.statistics.limits import mcnemar_p, tango_limit

NEGLIGIBLE = 1e-12


def rejection_probability(effect: float, num_pairs: int, *, churn: float, alpha: float) -> float:
    """Power of the exact one-sided McNemar test: P(p <= alpha) where the candidate is worse by `effect`, in 0..1."""
    worse, changed = churn + effect, 2 * churn + effect
    if changed <= 0:
        return 0.0
    total, mean = 0.0, num_pairs * changed
    reach = 9 * math.sqrt(max(1.0, mean)) + 9  # beyond it lies less than NEGLIGIBLE
    for num_changed in range(max(1, math.floor(mean - reach)), min(num_pairs, math.ceil(mean + reach)) + 1):
        weight = _binomial(num_changed, num_pairs, min(1.0, changed))
        if weight < NEGLIGIBLE:
            continue
        needed = _fewest_to_reject(num_changed, alpha)
        if needed <= num_changed:
            total += weight * float(betainc(needed, num_changed - needed + 1, worse / changed))
    return total


@cache
def minimum_detectable_effect(num_pairs: int, *, churn: float, alpha: float, power: float = 0.8) -> float:
    """The smallest worsening, in 0..1, that McNemar finds with this probability; 1.0 where nothing so small as all of it would be found."""
    low, high = 0.0, 1.0 - 2 * churn
    if rejection_probability(high, num_pairs, churn=churn, alpha=alpha) < power:
        return 1.0
    for _ in range(30):
        middle = (low + high) / 2
        if rejection_probability(middle, num_pairs, churn=churn, alpha=alpha) < power:
            low = middle
        else:
            high = middle
    return high


def pass_probability(effect: float, num_pairs: int, *, churn: float, margin: float, alpha: float) -> float:
    """P(the upper Tango limit of the worsening stays below `margin`) where it is truly `effect`: how often an evaluation of this size passes."""
    worse, better = churn + max(0.0, effect), churn + max(0.0, -effect)
    total = 0.0
    for num_better in range(num_pairs + 1):
        weight = _binomial(num_better, num_pairs, better)
        if weight < NEGLIGIBLE:
            continue
        rest = num_pairs - num_better
        most = _most_worse_that_pass(num_better, num_pairs, margin, alpha)
        if most >= 0:
            share = worse / (1 - better) if better < 1 else 0.0
            total += weight * (1.0 if most >= rest else 1 - float(betainc(most + 1, rest - most, share)) if share > 0 else 1.0)
    return min(1.0, total)


@cache
def _fewest_to_reject(num_changed: int, alpha: float) -> int:
    """Of `num_changed` changes, so many must be worse; num_changed + 1 where even all are too few."""
    low, high = num_changed // 2, num_changed + 1
    while low < high:
        middle = (low + high) // 2
        if mcnemar_p(middle, num_changed - middle) <= alpha:
            high = middle
        else:
            low = middle + 1
    return low


def _most_worse_that_pass(num_better: int, num_pairs: int, margin: float, alpha: float) -> int:
    """-1 where even none is too many. The limit rises with the number, so it is found by halving."""

    def passes(num_worse: int) -> bool:
        return tango_limit(num_worse, num_better, num_pairs, alpha=alpha, side="upper") < margin

    low, high = -1, num_pairs - num_better
    while low < high:
        middle = (low + high + 1) // 2
        if passes(middle):
            low = middle
        else:
            high = middle - 1
    return low


def _binomial(k: int, n: int, p: float) -> float:
    if p <= 0 or p >= 1:
        return float(k == (0 if p <= 0 else n))
    log = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * math.log(p) + (n - k) * math.log1p(-p)
    return math.exp(float(log))
