"""What an evaluation of a given size can see, against the simulated tables of the design and against enumeration."""

from __future__ import annotations

from itertools import product
from math import comb

import pytest

from dpo_loop.evaluation.statistics import mcnemar_p, tango_limit
from dpo_loop.evaluation.statistics.power import (
    minimum_detectable_effect,
    pass_probability,
    rejection_probability,
)

ALPHA = 0.05


def trinomial(worse: int, better: int, n: int, p_worse: float, p_better: float) -> float:
    rest = n - worse - better
    return comb(n, worse) * comb(n - worse, better) * p_worse**worse * p_better**better * (1 - p_worse - p_better) ** rest


@pytest.mark.parametrize(("effect", "churn", "n"), [(0.1, 0.03, 30), (0.0, 0.05, 25), (0.3, 0.0, 12)])
def test_power_and_passing_are_sums_over_all_outcomes(effect: float, churn: float, n: int) -> None:
    outcomes = [(b, c) for b, c in product(range(n + 1), repeat=2) if b + c <= n]
    chances = {(b, c): trinomial(b, c, n, churn + effect, churn) for b, c in outcomes}
    rejected = sum(chance for (b, c), chance in chances.items() if mcnemar_p(b, c) <= ALPHA)
    passed = sum(chance for (b, c), chance in chances.items() if tango_limit(b, c, n, alpha=ALPHA, side="upper") < 0.2)
    assert rejection_probability(effect, n, churn=churn, alpha=ALPHA) == pytest.approx(rejected, abs=1e-9)
    assert pass_probability(effect, n, churn=churn, margin=0.2, alpha=ALPHA) == pytest.approx(passed, abs=1e-9)


@pytest.mark.parametrize(
    ("n", "percent"),
    [(100, (6.7, 8.5, 10.7)), (200, (3.5, 5.0, 6.5)), (300, (2.2, 3.5, 5.0)), (500, (1.5, 2.5, 3.7)), (1000, (0.8, 1.7, 2.5))],
)
def test_the_smallest_effect_that_is_found_agrees_with_the_simulated_table(n: int, percent: tuple[float, ...]) -> None:
    found = [100 * minimum_detectable_effect(n, churn=churn, alpha=ALPHA) for churn in (0.0, 0.01, 0.03)]
    assert found == pytest.approx(percent, abs=0.35)
    assert rejection_probability(found[1] / 100, n, churn=0.01, alpha=ALPHA) == pytest.approx(0.8, abs=0.01)


@pytest.mark.parametrize(
    ("n", "at_3_points", "at_5_points"),
    [
        (56, (0.24, 0.23, 0.18), (0.61, 0.44, 0.37)),
        (210, (0.80, 0.65, 0.55), (0.99, 0.94, 0.88)),
        (420, (0.99, 0.90, 0.79), (1.0, 1.0, 0.99)),
    ],
)
def test_an_unchanged_model_passes_as_often_as_the_simulated_table_says(
    n: int, at_3_points: tuple[float, ...], at_5_points: tuple[float, ...]
) -> None:
    for margin, wanted in ((0.03, at_3_points), (0.05, at_5_points)):
        found = [pass_probability(0.0, n, churn=churn, margin=margin, alpha=ALPHA) for churn in (0.01, 0.02, 0.03)]
        assert found == pytest.approx(wanted, abs=0.035)


def test_a_worsening_as_large_as_the_margin_passes_about_as_often_as_alpha_says() -> None:
    for n in (100, 210, 500):
        assert 0.01 < pass_probability(0.05, n, churn=0.02, margin=0.05, alpha=ALPHA) < 0.065


def test_what_cannot_be_found_at_all_is_everything() -> None:
    assert minimum_detectable_effect(3, churn=0.0, alpha=ALPHA) == 1.0
    assert rejection_probability(0.0, 50, churn=0.0, alpha=ALPHA) == 0.0
