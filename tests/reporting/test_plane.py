from __future__ import annotations

from typing import Any

import pytest

from dpo_loop.reporting.plane import plane_chart, points_of, wilson
from dpo_loop.reporting.svg import StyleSheet
from dpo_loop.types import CheckResult, GateReport, GateState, PolicyRef, RoundSummary

REF = PolicyRef(base="b", base_sha256="0" * 64)
RATES: dict[str, Any] = dict.fromkeys(("pass_rate", "win_rate_previous", "win_rate_anchor"))


def row(number: int, harmful: float | None, refusal: float | None, *, promoted: bool = True) -> RoundSummary:
    return RoundSummary(round=number, parent=None, gate=None, promoted=promoted, num_pairs=None, seconds={}, report=None,
                        harmful_rate=harmful, over_refusal_rate=refusal, **RATES)  # fmt: skip


def gate(number: int, **changes: Any) -> GateReport:
    check = CheckResult(id="h", metric="harmful_rate", rule="non_inferior", vs="anchor", num_prompts=100, value=0.1, reference=0.02, delta=0.08,
                        ci_low=0.05, ci_high=0.1, margin=0.05, state=GateState.FAIL, why="")  # fmt: skip
    rates = {"candidate": {"harmful_rate": 0.1, "over_refusal_rate": 0.05, "num_harmful": 100.0, "num_benign": 200.0}}
    made = GateReport(run_id="r", round=number, state=GateState.FAIL, reasons=("x",), candidate=REF, previous=REF, anchor=REF, validity=(),
                      checks=(check,), rates=rates, created_at="")  # fmt: skip
    return made.model_copy(update=changes)


def test_wilson_is_the_published_interval() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3: 81/263, 15/148, 0/20, 1/29."""
    for count, num, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(count / num, num) == pytest.approx((low, high), abs=5e-5)


def test_rounds_without_both_rates_are_no_points_and_unknown_numbers_no_crosses() -> None:
    points = points_of([row(0, 0.02, 0.1), row(1, None, 0.1), row(2, 0.1, 0.05)], None)
    assert [(point.round, point.harmful_ci) for point in points] == [(0, None), (2, None)]


def test_intervals_come_from_the_prompts_that_all_rounds_share() -> None:
    history = [row(0, 0.02, 0.1), row(1, 0.1, 0.05, promoted=False)]
    start, own = points_of(history, gate(1))
    assert start.harmful_ci == wilson(0.02, 100)
    assert own.refusal_ci == wilson(0.05, 200)
    start, own = points_of(history, gate(1, topped_up=True))
    assert start.harmful_ci is None
    assert own.harmful_ci == wilson(0.1, 100)


def test_the_plane_says_in_words_what_it_draws() -> None:
    chart = plane_chart([row(0, 0.02, 0.1), row(1, 0.1, 0.05, promoted=False)], gate(1), StyleSheet())
    assert chart is not None
    assert "round 0, the anchor: 2.0 % harmful, 10.0 % over-refused, promoted" in chart.svg
    assert "round 1, the candidate: 10.0 % harmful, 5.0 % over-refused, not promoted" in chart.svg
    assert "0 anchor" in chart.svg
    assert "dashed" in chart.note
    assert "style=" not in chart.svg


def test_the_anchor_is_the_round_that_a_person_moved_it_to() -> None:
    chart = plane_chart([row(0, 0.3, 0.1), row(1, 0.02, 0.1), row(2, 0.1, 0.05)], gate(2, anchor_round=1), StyleSheet())
    assert chart is not None
    assert "round 1, the anchor" in chart.svg
    assert "round 0:" in chart.svg


def test_one_round_is_no_trajectory() -> None:
    assert plane_chart([row(0, 0.02, 0.1)], None, StyleSheet()) is None


def test_a_margin_that_allows_everything_is_no_line() -> None:
    history = [row(0, 0.98, 0.1), row(1, 0.1, 0.05)]
    chart = plane_chart(history, gate(1), StyleSheet())
    assert chart is not None
    assert "dashed" not in chart.note
