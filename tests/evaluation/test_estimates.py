"""Bootstrap intervals, length-controlled win rates and strengths, against closed forms, scipy and planted truths."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, norm

from dpo_loop.evaluation.statistics.bootstrap import Array, bca_interval
from dpo_loop.evaluation.statistics.bradley_terry import Game, strengths
from dpo_loop.evaluation.statistics.length_control import length_controlled

# ------------------------------------------------------------------------------------------------------------------ bootstrap


def mean(means_RC: Array) -> Array:
    return means_RC[:, 0]


def difference(means_RC: Array) -> Array:
    return means_RC[:, 0] - means_RC[:, 1]


def ratio(means_RC: Array) -> Array:
    return means_RC[:, 0] / means_RC[:, 1]


def every_sample_at_once(columns_CN: Array, *, alpha: float, seed: int, num_resamples: int) -> tuple[float, float]:
    """BCa limits of a ratio of sums as Efron writes them, with each resample and each leave-one-out sample written out."""
    columns = np.asarray(columns_CN)
    num = columns.shape[1]
    samples = columns[:, np.random.default_rng(seed).integers(num, size=(num_resamples, num))].sum(axis=2)
    left_out = np.stack([np.delete(columns, index, axis=1).sum(axis=1) for index in range(num)], axis=1)
    drawn, jackknife, (top, bottom) = samples[0] / samples[1], left_out[0] / left_out[1], columns.sum(axis=1)
    bias = norm.ppf((np.sum(drawn < top / bottom) + 0.5 * np.sum(drawn == top / bottom)) / num_resamples)
    pulls = jackknife.mean() - jackknife
    acceleration = np.sum(pulls**3) / (6 * np.sum(pulls**2) ** 1.5)
    z = np.array([norm.ppf(alpha), norm.ppf(1 - alpha)])
    low, high = np.quantile(drawn, norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return float(low), float(high)


@pytest.mark.parametrize("num", [2, 7, 60, 1_500])
def test_limits_are_those_of_all_samples_written_out(num: int) -> None:
    rng = np.random.default_rng(num)
    tokens = rng.integers(5, 400, num).astype(float)
    columns = np.array([tokens * rng.normal(0.02, 0.05, num), tokens])
    wanted = every_sample_at_once(columns, alpha=0.05, seed=3, num_resamples=2_000)
    assert bca_interval(columns, ratio, alpha=0.05, seed=3) == pytest.approx(wanted, abs=1e-9)


def test_bca_agrees_with_scipy() -> None:
    values = np.random.default_rng(1).exponential(size=80)
    ours = bca_interval([values.tolist()], mean, alpha=0.05, num_resamples=20_000)
    theirs = bootstrap((values,), np.mean, confidence_level=0.9, n_resamples=20_000, method="BCa", rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_paired_columns_are_resampled_together() -> None:
    rng = np.random.default_rng(2)
    hard = rng.normal(size=200)
    one, other = (hard + 0.5 + 0.01 * rng.normal(size=200)).tolist(), hard.tolist()
    low, high = bca_interval([one, other], difference, alpha=0.05) or (0.0, 0.0)
    assert 0.49 < low < 0.5 < high < 0.51


@pytest.mark.parametrize("values", [[0.0] * 50, [1 / 3] * 50, [1.0], [], [0.0, math.nan, 1.0], [1.0, math.inf]])
def test_without_spread_there_is_no_interval(values: list[float]) -> None:
    """A percentile bootstrap of zeros gives [0, 0], which would claim that nothing can ever go wrong."""
    assert bca_interval([values], mean, alpha=0.05) is None


def test_bca_covers_a_skewed_mean() -> None:
    rng, hits = np.random.default_rng(5), 0
    for trial in range(200):
        interval = bca_interval([rng.exponential(size=60).tolist()], mean, alpha=0.05, seed=trial, num_resamples=500)
        hits += interval is not None and interval[0] <= 1.0 <= interval[1]
    assert 0.83 <= hits / 200 <= 0.96


# ------------------------------------------------------------------------------------------------------------- length control


def test_a_judge_that_only_likes_length_leaves_an_even_win_rate() -> None:
    rng = np.random.default_rng(7)
    more = rng.normal(80, 100, size=800)  # the candidate is longer mostly
    wins = (rng.random(800) < 1 / (1 + np.exp(-2 * np.tanh(more / np.sqrt((more**2).mean()))))).astype(float)
    found = length_controlled(wins.tolist(), more.tolist(), alpha=0.05)
    assert found is not None
    assert wins.mean() > 0.6
    assert found.low < 0.5 < found.high
    assert found.slope == pytest.approx(2.0, abs=0.4)


def test_a_better_policy_of_the_same_length_keeps_its_win_rate() -> None:
    rng = np.random.default_rng(8)
    scores = rng.choice([1.0, 0.5, 0.0], p=[0.5, 0.3, 0.2], size=600)
    found = length_controlled(scores.tolist(), rng.normal(0, 50, size=600).tolist(), alpha=0.05)
    assert found is not None
    assert found.win_rate == pytest.approx(scores.mean(), abs=0.01)
    assert found.low - 0.01 < 0.65 < found.high


def test_the_fit_is_where_its_score_equations_are_zero() -> None:
    scores, more = [1.0, 1.0, 0.5, 0.0, 1.0, 0.0] * 5, [3.0, 1.0, -2.0, -1.0, 0.5, 4.0] * 5
    found = length_controlled(scores, more, alpha=0.05)
    assert found is not None
    x = np.tanh(np.asarray(more) / np.sqrt(np.mean(np.square(more))))
    p = 1 / (1 + np.exp(-(math.log(found.win_rate / (1 - found.win_rate)) + found.slope * x)))
    residual = np.asarray(scores) - p
    assert abs(residual.sum()) < 1e-2
    assert abs((residual * x).sum()) < 1e-2


@pytest.mark.parametrize(
    ("scores", "more"), [([1.0] * 30, [1.0, 2.0] * 15), ([1.0, 0.0] * 15, [0.0] * 30), ([1.0, 0.0] * 5, [1.0, 2.0] * 5), ([], [])]
)
def test_where_length_explains_nothing_there_is_nothing_to_control(scores: list[float], more: list[float]) -> None:
    assert length_controlled(scores, more, alpha=0.05) is None


# --------------------------------------------------------------------------------------------------------------- Bradley-Terry


def games_between(one: str, other: str, wins: int, ties: int, losses: int) -> list[Game]:
    scores = [1.0] * wins + [0.5] * ties + [0.0] * losses
    return [Game(f"p{n}", one, other, score) for n, score in enumerate(scores)]


def test_two_policies_have_the_closed_form() -> None:
    """With Davidson's ties the likelihood equation of two policies is wins / losses = e^(difference); half a win each is the prior
    (and that of nu moves it by less than a thousandth)."""
    found = strengths(games_between("r1", "anchor", 60, 20, 20), "anchor", alpha=0.05)
    assert found["anchor"] == (0.0, 0.0, 0.0)
    assert found["r1"].value == pytest.approx(math.log(60.5 / 20.5), abs=1e-3)
    assert found["r1"].low < found["r1"].value < found["r1"].high


def test_a_chain_of_rounds_adds_up_and_planted_strengths_are_found() -> None:
    rng, truth, nu = np.random.default_rng(4), {"anchor": 0.0, "r1": 0.4, "r2": 0.9, "r3": 0.7}, 0.6
    games = []
    for one, other in [("r1", "anchor"), ("r2", "r1"), ("r2", "anchor"), ("r3", "r2"), ("r3", "anchor")]:
        difference = truth[one] - truth[other]
        weights = np.array([math.exp(difference / 2), nu, math.exp(-difference / 2)])
        drawn = rng.choice([1.0, 0.5, 0.0], p=weights / weights.sum(), size=600)
        games += [Game(f"p{n}", one, other, float(score)) for n, score in enumerate(drawn)]
    found = strengths(games, "anchor", alpha=0.025, num_resamples=100)
    for name, value in truth.items():
        assert found[name].value == pytest.approx(value, abs=0.2)
        assert found[name].low - 0.1 <= value <= found[name].high + 0.1


def test_a_policy_that_never_lost_stays_at_a_finite_strength() -> None:
    found = strengths(games_between("r1", "anchor", 30, 0, 0), "anchor", alpha=0.05, num_resamples=20)
    assert 2 < found["r1"].value < 6
    assert strengths([], "anchor", alpha=0.05) == {"anchor": (0.0, 0.0, 0.0)}


def test_a_score_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not nan \(r1 against anchor\)"):
        strengths([Game("p", "r1", "anchor", math.nan)], "anchor", alpha=0.05)
