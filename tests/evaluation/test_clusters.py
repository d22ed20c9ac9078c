"""Prompts that belong together count for what they are worth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.evaluation.statistics import mcnemar_p, tango_limit
from dpo_loop.evaluation.statistics.clusters import cluster_sign_p, effective_counts

CHANGES = st.lists(st.sampled_from([-1, 0, 0, 0, 1]), min_size=1, max_size=60)


@given(CHANGES)
def test_where_each_prompt_is_its_own_cluster_nothing_changes(changes: list[int]) -> None:
    alone = [str(n) for n in range(len(changes))]
    counts = effective_counts(changes, alone)
    assert counts == (changes.count(1), changes.count(-1), len(changes), 1.0)
    assert cluster_sign_p(changes, alone) == mcnemar_p(changes.count(1), changes.count(-1))


@given(CHANGES.filter(lambda changes: len(changes) > 2 and len(set(changes)) > 1), st.integers(2, 4))
def test_copies_of_a_prompt_add_no_evidence(changes: list[int], copies: int) -> None:
    """By hand: with every prompt k times over, the variance over clusters is k times that of independent prompts, times G / (G - 1)."""
    copied = [change for change in changes for _ in range(copies)]
    names = [str(n) for n in range(len(changes)) for _ in range(copies)]
    counts = effective_counts(copied, names)
    correction = len(changes) / (len(changes) - 1)
    assert counts.design_effect == pytest.approx(copies * correction)
    assert counts.num_pairs == pytest.approx(len(changes) / correction)
    once = tango_limit(changes.count(1), changes.count(-1), len(changes), alpha=0.05, side="upper")
    again = tango_limit(*counts[:3], alpha=0.05, side="upper")
    assert again >= once - 1e-9, "never narrower than the prompts themselves"
    assert cluster_sign_p(copied, names) == mcnemar_p(changes.count(1), changes.count(-1))


@given(CHANGES, st.integers(1, 5))
def test_a_cluster_never_counts_for_more_than_its_prompts(changes: list[int], num_clusters: int) -> None:
    names = [str(n % num_clusters) for n in range(len(changes))]
    counts = effective_counts(changes, names)
    assert counts.design_effect >= 1
    assert counts.num_pairs <= len(changes)
    assert counts.num_worse - counts.num_better == pytest.approx(
        (changes.count(1) - changes.count(-1)) * counts.num_pairs / len(changes)
    )


def test_limits_cover_the_truth_where_prompts_fail_together() -> None:
    """60 clusters of 4 that fail as one in 10 % of the cases: ignoring that, the limit is below the truth far too often."""
    rng, truth = np.random.default_rng(3), 0.1
    names = [str(n // 4) for n in range(240)]
    missed_with = missed_without = 0
    for _ in range(400):
        changes = np.repeat((rng.random(60) < truth).astype(int), 4).tolist()
        counts = effective_counts(changes, names)
        missed_with += tango_limit(*counts[:3], alpha=0.05, side="upper") < truth
        missed_without += tango_limit(changes.count(1), 0, 240, alpha=0.05, side="upper") < truth
    assert missed_with / 400 <= 0.08
    assert missed_without / 400 > 0.12
