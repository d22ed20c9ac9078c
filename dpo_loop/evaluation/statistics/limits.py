"""Limits and tests of rates and of paired differences. Pure functions of counts. Of scipy only `special`: `scipy.stats` takes a second to import.

All limits are one-sided at confidence 1 - alpha, because the gate asks one-sided questions: is it no worse than a margin? A lower
and an upper limit together are an interval of confidence 1 - 2 alpha. With no observations a limit is the end of its range: nothing
is known, so nothing can pass. Percentile bootstraps are not used: near a rate of 0 they give an interval of width zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from scipy.special import betainc, betaincinv, ndtri

SideOfLimit = Literal["lower", "upper"]


def tango_limit(num_worse: float, num_better: float, num_pairs: float, *, alpha: float, side: SideOfLimit) -> float:
    """One-sided score limit of (num_worse - num_better) / num_pairs for paired binary outcomes, in -1..1.

    num_worse: the reference was good, the candidate is bad; num_better: the other way round; the remaining pairs agree. They need not be
    whole: clustered pairs come as effective numbers (clusters.py).
    Tango (1998), Statistics in Medicine 17:891-908: the limit is the difference at which the score statistic, its nuisance
    parameter estimated under that difference, equals the normal quantile; found by bisection.
    Raises ValueError if the counts cannot be.
    """
    if min(num_worse, num_better) < 0 or num_worse + num_better > num_pairs:
        raise ValueError(f"{num_worse} worse and {num_better} better do not fit into {num_pairs} pairs")
    if side == "lower":
        return -tango_limit(num_better, num_worse, num_pairs, alpha=alpha, side="upper")
    if num_worse == num_pairs:
        return 1.0
    b, c, n, z = num_worse, num_better, num_pairs, float(ndtri(1 - alpha))

    def statistic(delta: float) -> float:
        linear, constant = -b - c + (2 * n - b + c) * delta, -c * delta * (1 - delta)
        nuisance = (math.sqrt(max(linear * linear - 8 * n * constant, 0.0)) - linear) / (4 * n)
        return (b - c - n * delta) / math.sqrt(n * (2 * nuisance + delta * (1 - delta)) + 1e-12)

    low, high = (b - c) / n, 1.0 - 1e-9
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if statistic(middle) > -z else (low, middle)
    return high


def mcnemar_p(num_worse: int, num_better: int) -> float:
    """Exact one-sided McNemar test: how likely so many or more of the changed pairs would be worse if either way were as likely."""
    # P(X >= worse) of a fair binomial over all changed pairs is a regularised incomplete beta function
    return float(betainc(num_worse, num_better + 1, 0.5)) if num_worse else 1.0


def clopper_pearson_limit(num_hits: int, num_trials: int, *, alpha: float, side: SideOfLimit) -> float:
    """Exact one-sided limit of a proportion (Clopper & Pearson 1934, by the beta quantile)."""
    if not 0 <= num_hits <= num_trials:
        raise ValueError(f"{num_hits} of {num_trials} is not a count")
    if side == "upper":
        return 1.0 if num_hits == num_trials else float(betaincinv(num_hits + 1, num_trials - num_hits, 1 - alpha))
    return 0.0 if num_hits == 0 else float(betaincinv(num_hits, num_trials - num_hits + 1, alpha))


def wilson_interval(num_hits: int, num_trials: int, *, alpha: float) -> tuple[float, float]:
    """Score interval of a proportion (Wilson 1927) with one-sided limits at 1 - alpha each: to show a rate, not to decide on it."""
    if not 0 <= num_hits <= num_trials:
        raise ValueError(f"{num_hits} of {num_trials} is not a count")
    if num_trials == 0:
        return 0.0, 1.0
    z, share = float(ndtri(1 - alpha)), num_hits / num_trials
    centre = (share + z * z / (2 * num_trials)) / (1 + z * z / num_trials)
    half = z / (1 + z * z / num_trials) * math.sqrt(share * (1 - share) / num_trials + z * z / (4 * num_trials**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def win_rate_limit(num_wins: int, num_losses: int, num_prompts: int, *, alpha: float, side: SideOfLimit) -> float:
    """One-sided limit of the mean of per-prompt scores 1 (win), 0.5 (tie), 0 (loss), in 0..1.

    The mean is 1/2 + (wins - losses) / 2n, and (wins, losses, ties) of n prompts is the trinomial that Tango's limit is made for:
    a win is a discordant pair one way, a loss the other way, a tie a pair that agrees. So the limit is 1/2 + Tango / 2. A score
    interval keeps its coverage with few prompts or few decisions and never has width zero: all ties give 1/2 ± z² / 2(n + z²),
    where a t interval or a bootstrap of equal scores would claim certainty.
    """
    return 0.5 + tango_limit(num_wins, num_losses, num_prompts, alpha=alpha, side=side) / 2


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values (Holm 1979): rejecting where adjusted <= alpha keeps the chance of any false rejection at alpha."""
    adjusted, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = running
    return adjusted
