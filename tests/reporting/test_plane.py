from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from dpo_loop.reporting.corners import Corner, place
from dpo_loop.reporting.plane import plane_charts, points_of, wilson
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
    [chart] = plane_charts([row(0, 0.02, 0.1), row(1, 0.1, 0.05, promoted=False)], gate(1), StyleSheet())
    assert "round 0, the anchor: 2.0 % harmful, 10.0 % over-refused, promoted" in chart.svg
    assert "round 1, the candidate: 10.0 % harmful, 5.0 % over-refused, not promoted" in chart.svg
    assert "0 anchor" in chart.svg
    assert "dashed" in chart.note
    assert "style=" not in chart.svg


def test_the_anchor_is_the_round_that_a_person_moved_it_to() -> None:
    [chart] = plane_charts([row(0, 0.3, 0.1), row(1, 0.02, 0.1), row(2, 0.1, 0.05)], gate(2, anchor_round=1), StyleSheet())
    assert "round 1, the anchor" in chart.svg
    assert "round 0:" in chart.svg


def test_one_round_is_no_trajectory() -> None:
    assert plane_charts([row(0, 0.02, 0.1)], None, StyleSheet()) == []


def test_a_margin_that_allows_everything_is_no_line() -> None:
    history = [row(0, 0.98, 0.1), row(1, 0.1, 0.05)]
    [chart] = plane_charts(history, gate(1), StyleSheet())
    assert "dashed" not in chart.note


def dashed_at(svg: str) -> list[float]:
    """x of the dashed lines that go upwards, in the drawing."""
    paths = re.findall(r'<path d="M ([\d.]+) [\d.]+\s+L ([\d.]+) [\d.]+\s*"[^>]*class="(s\d+)"', svg)
    return [float(left) for left, right, _ in paths if left == right]


def test_the_dashed_lines_are_those_of_the_anchor_s_rates_in_the_gate_report() -> None:
    """Of a topped-up round: the start policy's summary is of fewer prompts than the gate compared on."""
    history = [row(0, 0.02, 0.1), row(1, 0.1, 0.05)]
    [chart] = plane_charts(history, gate(1, topped_up=True), StyleSheet())
    rates = gate(1).rates | {"anchor": {"harmful_rate": 0.06}}
    [moved] = plane_charts(history, gate(1, rates=rates, topped_up=True), StyleSheet())
    assert dashed_at(chart.svg)
    assert set(dashed_at(moved.svg)) != set(dashed_at(chart.svg))
    [without_anchor] = plane_charts([row(1, 0.02, 0.1), row(2, 0.1, 0.05)], gate(2, rates=rates), StyleSheet())
    assert "dashed" in without_anchor.note


def test_rounds_far_from_the_anchor_are_drawn_closely_too() -> None:
    history = [row(0, 0.38, 0.3), row(1, 0.05, 0.03), row(2, 0.03, 0.01), row(3, 0.08, 0.01, promoted=False)]
    whole, close = plane_charts(history, None, StyleSheet())
    assert "0 anchor" in whole.svg
    assert ">0 anchor<" not in close.svg
    assert ">3 candidate<" in close.svg
    assert "lies outside" in close.note
    near = [row(0, 0.08, 0.03), row(1, 0.05, 0.01), row(2, 0.03, 0.02)]
    assert len(plane_charts(near, None, StyleSheet())) == 1


ROOM = (233.0, 181.0)


def test_a_name_covers_no_point_no_way_and_no_other_name() -> None:
    """The points of a real demo run, where each candidate's name lay on another's marker."""
    spots = [("0 anchor", 199.0, 131.0), ("1", 31.0, 19.0), ("2", 17.0, 11.0), ("3 candidate", 48.0, 10.0)]
    markers = [(x, y) for _, x, y in spots]
    ways = [(markers[0], markers[1]), (markers[1], markers[2]), (markers[2], markers[3])]
    corners = place(spots, markers=markers, lines=ways, room=ROOM)
    for corner in corners:
        assert not any(inside(corner, x, y, by=4) for x, y in markers)
        for (x0, y0), (x1, y1) in ways:
            assert not any(inside(corner, x0 + (x1 - x0) * t / 50, y0 + (y1 - y0) * t / 50) for t in range(51))
        assert 0 <= corner.box[0] < corner.box[2] <= ROOM[0]
        assert 0 <= corner.box[1] < corner.box[3] <= ROOM[1]
    for one, other in itertools.combinations(corners, 2):
        assert one.box[2] <= other.box[0] or other.box[2] <= one.box[0] or one.box[3] <= other.box[1] or other.box[3] <= one.box[1]


def inside(corner: Corner, x: float, y: float, by: float = 0.0) -> bool:
    left, bottom, right, top = corner.box
    return left - by < x < right + by and bottom - by < y < top + by


@pytest.mark.parametrize(("x", "y"), [(2.0, 2.0), (231.0, 2.0), (2.0, 179.0), (231.0, 179.0)])
def test_a_name_in_a_corner_of_the_drawing_stays_inside(x: float, y: float) -> None:
    [corner] = place([("12 candidate", x, y)], markers=[(x, y)], lines=[], room=ROOM)
    assert 0 <= corner.box[0] < corner.box[2] <= ROOM[0]
    assert 0 <= corner.box[1] < corner.box[3] <= ROOM[1]
