from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from dpo_loop.evaluation.statistics import (
    clopper_pearson_limit,
    holm,
    mcnemar_p,
    tango_limit,
    wilson_interval,
    win_rate_limit,
)

Z = 1.6448536269514722
TABLES = st.integers(1, 400).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda b: st.tuples(st.just(b), st.integers(0, n - b), st.just(n)))
)


@pytest.mark.parametrize(
    ("worse", "better", "n", "lower", "upper"),
    [
        (2, 0, 200, -0.35, 2.98),
        (2, 2, 200, -2.10, 2.10),
        (3, 1, 300, -0.59, 2.18),
        (5, 2, 300, -0.54, 2.80),
        (10, 5, 500, -0.30, 2.44),
    ],
)
def test_tango_limits_have_their_published_values(worse: int, better: int, n: int, lower: float, upper: float) -> None:
    assert 100 * tango_limit(worse, better, n, alpha=0.05, side="lower") == pytest.approx(lower, abs=0.006)
    assert 100 * tango_limit(worse, better, n, alpha=0.05, side="upper") == pytest.approx(upper, abs=0.006)


@pytest.mark.parametrize("n", [1, 56, 100, 210, 420])
def test_tango_limit_without_any_change_has_its_closed_form(n: int) -> None:
    assert tango_limit(0, 0, n, alpha=0.05, side="upper") == pytest.approx(Z**2 / (n + Z**2), abs=1e-6)


@given(TABLES)
def test_tango_is_antisymmetric_and_encloses_the_estimate(table: tuple[int, int, int]) -> None:
    worse, better, n = table
    lower, upper = (tango_limit(worse, better, n, alpha=0.05, side=side) for side in ("lower", "upper"))
    assert lower == -tango_limit(better, worse, n, alpha=0.05, side="upper")
    assert -1 <= lower <= (worse - better) / n <= upper <= 1
    assert upper - lower > 1e-6


@given(TABLES)
def test_one_more_failure_raises_both_tango_limits_and_lowers_the_p_value(table: tuple[int, int, int]) -> None:
    worse, better, n = table
    if worse + better < n:  # a prompt on which both agreed becomes a failure
        for side in ("lower", "upper"):
            assert (
                tango_limit(worse + 1, better, n, alpha=0.05, side=side)
                >= tango_limit(worse, better, n, alpha=0.05, side=side) - 1e-9
            )
        assert mcnemar_p(worse + 1, better) <= mcnemar_p(worse, better)
    if better:  # a prompt that the candidate had mended is bad again
        for side in ("lower", "upper"):
            assert (
                tango_limit(worse, better - 1, n, alpha=0.05, side=side)
                >= tango_limit(worse, better, n, alpha=0.05, side=side) - 1e-9
            )


def test_with_no_pairs_nothing_is_known() -> None:
    assert tango_limit(0, 0, 0, alpha=0.05, side="upper") == 1
    assert tango_limit(0, 0, 0, alpha=0.05, side="lower") == -1
    assert clopper_pearson_limit(0, 0, alpha=0.05, side="upper") == 1
    assert clopper_pearson_limit(0, 0, alpha=0.05, side="lower") == 0
    assert wilson_interval(0, 0, alpha=0.05) == (0, 1)


@pytest.mark.parametrize("counts", [(-1, 0, 5), (3, 3, 5)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        tango_limit(*counts, alpha=0.05, side="upper")
    with pytest.raises(ValueError, match="not a count"):
        clopper_pearson_limit(6, 5, alpha=0.05, side="upper")


@pytest.mark.parametrize(
    ("hits", "n", "percent"), [(0, 100, 2.95), (2, 100, 6.16), (0, 210, 1.416), (2, 210, 2.967), (5, 300, 3.47), (1, 15, 27.9)]
)
def test_clopper_pearson_upper_limits_have_their_published_values(hits: int, n: int, percent: float) -> None:
    assert 100 * clopper_pearson_limit(hits, n, alpha=0.05, side="upper") == pytest.approx(percent, rel=2e-3)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_proportion_limits_are_those_of_scipy(case: tuple[int, int]) -> None:
    hits, n = case
    exact = binomtest(hits, n).proportion_ci(0.9, "exact")
    assert clopper_pearson_limit(hits, n, alpha=0.05, side="lower") == pytest.approx(exact.low, abs=1e-9)
    assert clopper_pearson_limit(hits, n, alpha=0.05, side="upper") == pytest.approx(exact.high, abs=1e-9)
    score = binomtest(hits, n).proportion_ci(0.9, "wilson")
    assert wilson_interval(hits, n, alpha=0.05) == pytest.approx((score.low, score.high), abs=1e-9)


def test_mcnemar_is_the_binomial_tail() -> None:
    assert mcnemar_p(5, 0) == pytest.approx(1 / 32)
    assert mcnemar_p(2, 1) == pytest.approx(0.5)
    assert mcnemar_p(0, 0) == 1
    assert mcnemar_p(0, 4) == 1
    assert mcnemar_p(31, 12) == pytest.approx(binomtest(31, 43, alternative="greater").pvalue)


def test_holm_adjusts_as_in_the_textbook() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"d": 0.02, "a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({}) == {}


def test_win_rate_interval_is_even_handed_and_never_of_width_zero() -> None:
    all_ties = [win_rate_limit(0, 0, 100, alpha=0.05, side=side) for side in ("lower", "upper")]
    assert all_ties == pytest.approx([0.5 - Z**2 / 2 / (100 + Z**2), 0.5 + Z**2 / 2 / (100 + Z**2)], abs=1e-6)
    all_wins = [win_rate_limit(20, 0, 20, alpha=0.05, side=side) for side in ("lower", "upper")]
    assert 0.8 < all_wins[0] < all_wins[1] == 1
    assert win_rate_limit(70, 30, 200, alpha=0.05, side="lower") == pytest.approx(
        1 - win_rate_limit(30, 70, 200, alpha=0.05, side="upper")
    )


def test_tango_rule_passes_a_model_at_the_margin_about_as_often_as_alpha_says() -> None:
    """Truth exactly at a margin of 5 points (8 % newly bad, 3 % mended, n = 210): non-inferiority is declared wrongly in 5 %."""
    tables = np.random.default_rng(17).multinomial(210, [0.08, 0.03, 0.89], size=4_000)
    passed = _mean(tables, lambda worse, better: tango_limit(worse, better, 210, alpha=0.05, side="upper") < 0.05)
    assert 0.035 < passed < 0.065


@pytest.mark.parametrize("chances", [(0.3, 0.3, 0.4), (0.1, 0.02, 0.88), (0.6, 0.3, 0.1)])
def test_win_rate_limits_cover_the_truth_as_often_as_alpha_says(chances: tuple[float, float, float]) -> None:
    truth = 0.5 + (chances[0] - chances[1]) / 2
    tables = np.random.default_rng(18).multinomial(120, chances, size=4_000)
    for side, covers in (("lower", np.less_equal), ("upper", np.greater_equal)):
        share = _mean(
            tables,
            lambda wins, losses, side=side, covers=covers: covers(win_rate_limit(wins, losses, 120, alpha=0.05, side=side), truth),
        )
        assert 0.93 < share < 0.975


def _mean(tables: np.ndarray, holds: object) -> float:
    """Share of tables for which `holds(first, second)`; equal tables are computed once."""
    found, times = np.unique(tables[:, :2], axis=0, return_counts=True)
    return float(sum(count for (a, b), count in zip(found.tolist(), times, strict=True) if holds(a, b)) / times.sum())
