"""Paired differences where prompts belong together: paraphrases, members of a contrast pair, several answers to one prompt.

Prompts of one cluster fail together, so they hold less evidence than their number says. By how much is measured (the design effect), and the
counts are divided by it before they go into the same limits: Rao and Scott (1992), "A simple method for the analysis of clustered binary data",
Biometrics 48:577-585. A cluster never counts for more than its prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dpo_loop.evaluation.statistics.limits import mcnemar_p


class EffectiveCounts(NamedTuple):
    """Of pairs, as tango_limit takes them. design_effect: by how much they were divided, at least 1."""

    num_worse: float
    num_better: float
    num_pairs: float
    design_effect: float


def effective_counts(changes: Sequence[int], clusters: Sequence[str]) -> EffectiveCounts:
    """changes: +1 where the candidate is worse on a prompt, -1 where it is better, 0 where nothing changed. clusters: of each prompt.

    The design effect is the variance of the mean change over clusters (ratio estimator with its G / (G - 1) correction) over that of
    independent prompts. Where it cannot be measured (a single cluster) the whole is worth one pair.
    """
    n = len(changes)
    worse, better = changes.count(1), changes.count(-1)
    sums: dict[str, int] = defaultdict(int)
    sizes: dict[str, int] = defaultdict(int)
    for change, cluster in zip(changes, clusters, strict=True):
        sums[cluster] += change
        sizes[cluster] += 1
    num_clusters = len(sums)
    if num_clusters in (0, n):
        return EffectiveCounts(worse, better, n, 1.0)
    if num_clusters == 1:
        return EffectiveCounts(worse / n, better / n, 1.0, float(n))
    mean = (worse - better) / n
    independent = (worse + better - n * mean * mean) / (n * n)
    correction = num_clusters / (num_clusters - 1)
    clustered = correction * sum((sums[name] - sizes[name] * mean) ** 2 for name in sums) / (n * n)
    effect = max(1.0, clustered / independent) if independent > 0 else 1.0
    return EffectiveCounts(worse / effect, better / effect, n / effect, effect)


def cluster_sign_p(changes: Sequence[int], clusters: Sequence[str]) -> float:
    """Exact one-sided sign test over clusters, McNemar's where every prompt is one: a cluster is worse where most of its changes are."""
    sums: dict[str, int] = defaultdict(int)
    for change, cluster in zip(changes, clusters, strict=True):
        sums[cluster] += change
    return mcnemar_p(sum(total > 0 for total in sums.values()), sum(total < 0 for total in sums.values()))
