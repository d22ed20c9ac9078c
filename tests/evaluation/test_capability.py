"""compare(): capability of candidate and reference, item by item, against closed forms and by simulation."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import norm

from dpo_loop.evaluation.capability import CapabilityFigures, compare
from dpo_loop.types import CapabilityRow

NAN, INF = float("nan"), float("inf")
TWELVE = [2.0 + n / 10 for n in range(12)]


def rows(measure: str, values: Sequence[float | None], *, task: str = "t", weights: Sequence[float] = ()) -> list[CapabilityRow]:
    weights = weights or [1.0] * len(values)
    pairs = enumerate(zip(values, weights, strict=True))
    return [CapabilityRow(task=task, item_id=f"i{i}", measure=measure, value=v, weight=w) for i, (v, w) in pairs]


def right(candidate: Sequence[float | None], reference: Sequence[float | None], *, alpha: float = 0.05) -> CapabilityFigures | str:
    return compare("t", rows("correct", candidate), rows("correct", reference), alpha)


def nll(
    candidate: Sequence[float | None], reference: Sequence[float | None], *, weights: Sequence[float] = (), seed: int = 0
) -> CapabilityFigures | str:
    return compare("t", rows("nll", candidate, weights=weights), rows("nll", reference, weights=weights), 0.05, seed=seed)


def test_the_fall_of_accuracy_has_tangos_limits_and_mcnemars_p() -> None:
    # facts/gate.md §3: (b, c, n) = (10, 5, 500) has U 2.44 % and L -0.30 %
    found = right([0.0] * 10 + [1.0] * 5 + [1.0] * 400 + [0.0] * 85, [1.0] * 10 + [0.0] * 5 + [1.0] * 400 + [0.0] * 85)
    assert (found.measure, found.num_items, found.value, found.reference) == ("correct", 500, 405 / 500, 410 / 500)
    assert found.harm == pytest.approx(0.01)
    assert (found.low, found.high) == pytest.approx((-0.0030, 0.0244), abs=1e-4)
    assert found.p_value == pytest.approx(sum(math.comb(15, k) for k in range(10, 16)) / 2**15)
    assert 0.01 < found.mde < 0.03


def test_the_same_answers_leave_a_limit_that_the_number_of_items_sets() -> None:
    z2 = norm.ppf(0.95) ** 2
    found = right([1.0, 0.0] * 105, [1.0, 0.0] * 105)
    assert (found.harm, found.p_value) == (0.0, 1.0)
    assert found.high == pytest.approx(z2 / (210 + z2), abs=1e-6)
    assert found.low == pytest.approx(-found.high)


@pytest.mark.parametrize("unscored", [None, NAN, INF])
def test_an_unscored_item_is_wrong_for_the_candidate_and_right_for_the_reference(unscored: float | None) -> None:
    found = right([unscored, 1.0, 1.0, unscored], [1.0, unscored, 0.0, unscored])
    assert (found.value, found.reference, found.harm) == (0.5, 0.75, 0.25)


def test_the_rise_of_perplexity_is_weighted_by_tokens() -> None:
    tokens = [10.0, 20.0, 30.0, 40.0] * 3
    found = nll([21.0, 45.0, 60.0, 85.0] * 3, [20.0, 44.0, 61.0, 80.0] * 3, weights=tokens)
    assert (found.value, found.reference) == pytest.approx((math.exp(2.11), math.exp(2.05)))
    assert found.harm == pytest.approx(math.exp(0.06) - 1)
    assert found.low < found.harm < found.high
    assert (found.p_value, found.mde, found.num_items) == (None, None, 12)


def test_a_candidate_that_changed_no_document_is_known_to_have_changed_none() -> None:
    """It was INVALID: resampling shows no spread, and no interval was taken for no measurement."""
    same = [20.0 + n for n in range(12)]
    found = nll(same, same)
    assert (found.harm, found.low, found.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("change", [0.1, -0.1, 1 / 3])
def test_the_same_relative_change_of_every_document_is_known_exactly(change: float) -> None:
    tokens = [7.0 * n for n in range(1, 13)]
    reference = [2.3 * num + n for n, num in enumerate(tokens)]
    found = nll([value + change * num for value, num in zip(reference, tokens, strict=True)], reference, weights=tokens)
    assert found.harm == pytest.approx(math.expm1(change))
    assert (found.low, found.high) == (found.harm, found.harm)


def test_a_change_of_one_document_among_many_has_limits_around_it() -> None:
    reference = [20.0] * 40
    found = nll([25.0, *reference[1:]], reference, weights=[10.0] * 40)
    assert found.harm == pytest.approx(math.expm1(5 / 400))
    assert found.low < found.harm < found.high


@pytest.mark.timeout(30)
def test_ten_thousand_documents_take_seconds_and_little_memory() -> None:
    """The jackknife held a copy of all documents for each of them: 1.3 GB at 5,000."""
    rng = np.random.default_rng(6)
    reference = rng.normal(300, 40, 10_000)
    candidate = (reference + rng.normal(2, 10, 10_000)).tolist()
    mine, theirs = rows("nll", candidate, weights=[100.0] * 10_000), rows("nll", reference.tolist(), weights=[100.0] * 10_000)
    tracemalloc.start()
    try:
        found = compare("t", mine, theirs, 0.05)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found.low < found.harm < found.high
    assert peak_bytes < 100e6


def test_limits_of_many_equal_documents_are_the_normal_ones() -> None:
    rng = np.random.default_rng(3)
    reference = rng.normal(300, 40, 400)
    candidate = reference + rng.normal(2, 10, 400)
    found = nll(candidate.tolist(), reference.tolist(), weights=[100.0] * 400)
    change = (candidate - reference) / 100
    reach = norm.ppf(0.95) * change.std(ddof=1) / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx(
        (math.expm1(change.mean() - reach), math.expm1(change.mean() + reach)), abs=5e-4
    )
    assert found == nll(candidate.tolist(), reference.tolist(), weights=[100.0] * 400)
    assert found.high != nll(candidate.tolist(), reference.tolist(), weights=[100.0] * 400, seed=1).high


def test_limits_of_the_perplexity_ratio_hold_as_often_as_they_say() -> None:
    """Documents of very different length, 60 of them, truth +2 %: each one-sided 95 % limit misses in about 5 % of evaluations."""
    rng, truth, num_trials = np.random.default_rng(11), math.log(1.02), 250
    too_low = too_high = 0
    for trial in range(num_trials):
        tokens = rng.integers(20, 400, 60).astype(float)
        reference = tokens * rng.normal(2.5, 0.4, 60)
        candidate = reference + tokens * rng.normal(truth, 0.05, 60)
        found = nll(candidate.tolist(), reference.tolist(), weights=tokens.tolist(), seed=trial)
        too_low += found.high < 0.02
        too_high += found.low > 0.02
    assert 0.02 < too_low / num_trials < 0.10
    assert 0.02 < too_high / num_trials < 0.10


@pytest.mark.parametrize(
    ("candidate", "reference", "says"),
    [
        ([2.0], [2.1], "1 documents, and limits over fewer than 10 say nothing"),
        ([2.0] * 9, [2.0] * 9, "9 documents, and limits over fewer than 10 say nothing"),
        ([2.0, None], [2.0, 3.0], "could not be scored for the candidate"),
        ([2.0, 1.0], [None, 3.0], "could not be scored for the reference"),
        ([2.0, NAN, 1.0], [2.0, 3.0, 2.0], "has exploded: the log-likelihood of a document is nan for the candidate"),
        ([2.0, INF], [2.0, 3.0], "has exploded: the log-likelihood of a document is inf for the candidate"),
        ([2.0, 1.0], [-INF, 3.0], "has exploded: the log-likelihood of a document is -inf for the reference"),
        ([1e6, *TWELVE], [2.0, *TWELVE], "has exploded: up to 1e+06 nats per token for the candidate"),
        (TWELVE, [1e308] * 12, "has exploded: up to 1e+308 nats per token for the reference"),
    ],
)
def test_perplexities_that_cannot_be_compared_are_a_sentence_never_a_figure(
    candidate: list[float | None], reference: list[float | None], says: str
) -> None:
    found = nll(candidate, reference)
    assert isinstance(found, str)
    assert says in found


def test_documents_of_other_lengths_are_not_compared() -> None:
    one, other = rows("nll", [2.0, 3.0], weights=[4.0, 5.0]), rows("nll", [2.0, 3.1], weights=[4.0, 6.0])
    assert "not the same number of tokens" in compare("t", one, other, 0.05)
    assert "or none" in compare("t", rows("nll", [2.0, 3.0], weights=[0.0, 1.0]), rows("nll", [2.0, 4.0], weights=[0.0, 1.0]), 0.05)


def test_other_items_other_measures_and_items_twice_are_sentences() -> None:
    three = rows("correct", [1.0, 0.0, 1.0])
    assert "1 only the candidate, 0 only the reference" in compare("t", three, three[:2], 0.05)
    assert "0 only the candidate, 1 only the reference" in compare("t", three[1:], three, 0.05)
    assert "mixes measures" in compare("t", three, rows("nll", [1.0, 0.0, 1.0]), 0.05)
    assert "is there twice" in compare("t", [*three, three[0]], three, 0.05)
    assert "neither right (1) nor wrong (0)" in compare("t", rows("correct", [0.5, 1.0, 1.0]), three, 0.05)
    assert "for one of the policies" in compare("t", three, [], 0.05)
    assert "for both policies" in compare("other", three, three, 0.05)


def test_rows_of_other_tasks_are_passed_over() -> None:
    mine = [*rows("correct", [1.0, 1.0]), *rows("correct", [0.0, 0.0], task="other")]
    assert compare("t", mine, mine, 0.05).value == 1.0
