"""Safety against usefulness: every round as a point, harmful compliance to the right, over-refusal upwards. A policy gets better towards the
lower left; one that moves along the other diagonal only trades the one for the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from dpo_loop.reporting.charts import CARD, INK, LINE, MUTED, SERIES, Chart, drawing, percent_ticks
from dpo_loop.reporting.corners import place
from dpo_loop.reporting.svg import StyleSheet
from dpo_loop.types import GateReport, RoundSummary

_Z = 1.959964
"""Two-sided 95 %."""
_TITLE = "Safety against over-refusal"
_AXES = {"harmful_rate": "harmful", "over_refusal_rate": "refusal"}
_SIZE, _BOX = (4.0, 3.0), (0.16, 0.14, 0.79, 0.84)
_ROOM = (_SIZE[0] * 72 * _BOX[2], _SIZE[1] * 72 * _BOX[3])
"""Width and height of the axes in points."""
_NEAR = 9.0
"""Points, at which markers cover each other."""
_FAR = 0.4
"""Of the whole plane; rounds that take less of it than this are drawn closely too."""


@dataclass(frozen=True, slots=True)
class Point:
    """Of one round's candidate. harmful_ci, refusal_ci: 95 % Wilson intervals, None where the number of prompts is not known."""

    round: int
    harmful: float
    refusal: float
    promoted: bool
    harmful_ci: tuple[float, float] | None
    refusal_ci: tuple[float, float] | None


def wilson(rate: float, num: float) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, 1927)."""
    z2 = _Z**2
    middle = (rate + z2 / (2 * num)) / (1 + z2 / num)
    half = _Z * math.sqrt(rate * (1 - rate) / num + z2 / (4 * num**2)) / (1 + z2 / num)
    return max(0.0, middle - half), min(1.0, middle + half)


def points_of(history: Sequence[RoundSummary], gate: GateReport | None) -> list[Point]:
    """Every round of a run is asked the same prompts, so that the numbers in this round's gate report hold for all; where the reserve was asked
    too, for this round alone."""
    own = gate.rates.get("candidate", {}) if gate else {}
    found = []
    for row in history:
        is_own = gate is not None and row.round == gate.round
        sizes = own if gate is not None and (is_own or not gate.topped_up) else {}
        rates = own if is_own else {}
        harmful, refusal = rates.get("harmful_rate", row.harmful_rate), rates.get("over_refusal_rate", row.over_refusal_rate)
        if harmful is not None and refusal is not None:
            cis = (_interval(harmful, sizes.get("num_harmful")), _interval(refusal, sizes.get("num_benign")))
            found.append(Point(row.round, harmful, refusal, row.promoted, *cis))
    return found


def _interval(rate: float, num: float | None) -> tuple[float, float] | None:
    return wilson(rate, num) if num else None


@dataclass(frozen=True, slots=True)
class View:
    """What a drawing shows of the plane: rates from..to, left to right and upwards."""

    harmful: tuple[float, float]
    refusal: tuple[float, float]

    def holds(self, harmful: float, refusal: float) -> bool:
        return self.harmful[0] <= harmful <= self.harmful[1] and self.refusal[0] <= refusal <= self.refusal[1]

    def place_of(self, harmful: float, refusal: float) -> tuple[float, float]:
        """In points of the drawing, from its lower left."""
        (left, right), (bottom, top) = self.harmful, self.refusal
        return _ROOM[0] * (harmful - left) / (right - left), _ROOM[1] * (refusal - bottom) / (top - bottom)


def plane_charts(history: Sequence[RoundSummary], gate: GateReport | None, sheet: StyleSheet) -> list[Chart]:
    """Once there are two rounds to compare. Dashed: what the anchor's checks allow. A second one shows the rounds closely, where the anchor is far away."""
    points = points_of(history, gate)
    if len(points) < 2:
        return []
    anchor_round = gate.anchor_round if gate else 0
    limits = _limits(points, anchor_round, gate)
    alt = _spoken(points, anchor_round)
    note = "lower left is better; filled: promoted, hollow: kept aside; crosses are 95 % intervals"
    note += "; dashed: the most that the anchor's margins allow" if limits else ""
    whole = _whole(points, limits)
    charts = [Chart(_TITLE, note, _drawn(_TITLE, points, whole, limits, anchor_round, sheet, alt=alt))]
    if close := _close(points, anchor_round, whole):
        title = f"{_TITLE}, up close"
        told = f"The same without the anchor, from {100 * close.harmful[0]:.1f} to {100 * close.harmful[1]:.1f} % harmful compliance. {alt}"
        beside = "the rounds after the anchor, which lies outside"
        charts.append(Chart(title, beside, _drawn(title, points, close, limits, anchor_round, sheet, alt=told)))
    return charts


def _drawn(
    title: str, points: Sequence[Point], view: View, limits: dict[str, float], anchor_round: int, sheet: StyleSheet, *, alt: str
) -> Markup:
    with drawing(title, sheet, size=_SIZE, box=_BOX, alt=alt) as (axes, finished):
        _dress(axes, view)
        _draw_ways(axes, points)
        for point in points:
            _draw_point(axes, point, is_last=point is points[-1])
        for name, at in limits.items():
            (axes.axvline if name == "harmful" else axes.axhline)(at, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _name_points(axes, points, view, limits, anchor_round)
    return finished()


def _limits(points: Sequence[Point], anchor_round: int, gate: GateReport | None) -> dict[str, float]:
    """From the anchor's rates in this round's gate report, which the checks compared with; those of its own round may be of fewer prompts."""
    anchor = next((point for point in points if point.round == anchor_round), None)
    if gate is None:
        return {}
    own = {} if anchor is None else {"harmful_rate": anchor.harmful, "over_refusal_rate": anchor.refusal}
    rates = own | {name: rate for name, rate in gate.rates.get("anchor", {}).items() if name in _AXES and rate is not None}
    against = [check for check in gate.checks if check.rule == "non_inferior" and check.vs == "anchor" and check.metric in rates]
    allowed = {_AXES[check.metric]: rates[check.metric] + check.margin for check in against}
    return {name: rate for name, rate in allowed.items() if rate < 1}


def _extent(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    harmful = [value for point in points for value in (point.harmful, *(point.harmful_ci or ()))]
    refusal = [value for point in points for value in (point.refusal, *(point.refusal_ci or ()))]
    return harmful, refusal


def _whole(points: Sequence[Point], limits: dict[str, float]) -> View:
    harmful, refusal = _extent(points)
    most = max(*harmful, limits.get("harmful", 0.0), 0.02), max(*refusal, limits.get("refusal", 0.0), 0.02)
    return View(*((-0.03 * end, min(1.06, 1.08 * end)) for end in most))


def _close(points: Sequence[Point], anchor_round: int, whole: View) -> View | None:
    """None where the whole plane shows the other rounds well enough."""
    others = [point for point in points if point.round != anchor_round]
    if len(others) < 2 or len(others) == len(points):
        return None
    spans = []
    for values, (low, high) in zip(_extent(others), (whole.harmful, whole.refusal), strict=True):
        room = max(0.12 * (max(values) - min(values)), 0.002)
        spans.append((max(min(values) - room, -0.03 * max(values)), max(values) + room))
        if spans[-1][1] - spans[-1][0] > _FAR * (high - low):
            return None
    view = View(*spans)
    return None if any(view.holds(point.harmful, point.refusal) for point in points if point.round == anchor_round) else view


def _ways(points: Sequence[Point]) -> Iterator[tuple[Point, Point]]:
    """From the policy that generated to the candidate that it led to."""
    parent = points[0]
    for point in points[1:]:
        yield parent, point
        parent = point if point.promoted else parent


def _draw_ways(axes: Any, points: Sequence[Point]) -> None:
    """Solid from promoted to promoted policy, dotted to a candidate that was kept aside."""
    for parent, point in _ways(points):
        arrow = axes.annotate(
            "",
            (point.harmful, point.refusal),
            (parent.harmful, parent.refusal),
            arrowprops={
                "arrowstyle": "->",
                "color": MUTED,
                "linewidth": 1.3,
                "linestyle": "-" if point.promoted else (0, (1, 2)),
                "shrinkA": 6,
                "shrinkB": 6,
            },
        )
        arrow.arrow_patch.set_clip_box(axes.bbox)
        arrow.arrow_patch.set_clip_on(True)


def _draw_point(axes: Any, point: Point, *, is_last: bool) -> None:
    colour = SERIES[1] if is_last else SERIES[0]
    width = 1.4 if is_last else 0.8
    if point.harmful_ci:
        axes.plot(point.harmful_ci, [point.refusal] * 2, color=colour, linewidth=width, alpha=1 if is_last else 0.55, zorder=2)
    if point.refusal_ci:
        axes.plot([point.harmful] * 2, point.refusal_ci, color=colour, linewidth=width, alpha=1 if is_last else 0.55, zorder=2)
    axes.plot([point.harmful], [point.refusal], marker="o", markersize=9 if is_last else 7, markeredgecolor=colour, markeredgewidth=2,
              markerfacecolor=colour if point.promoted else CARD, zorder=4)  # fmt: skip


def _dress(axes: Any, view: View) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=10)
    for ends, axis, limit in ((view.harmful, axes.xaxis, axes.set_xlim), (view.refusal, axes.yaxis, axes.set_ylim)):
        limit(*ends)
        percent_ticks(axis, num=5, digits=0 if ends[1] - ends[0] > 0.06 else 1)
    axes.set_xlabel("harmful compliance", color=MUTED, fontsize=10, labelpad=2)
    axes.set_ylabel("over-refusal", color=MUTED, fontsize=10, labelpad=2)


def _name_points(axes: Any, points: Sequence[Point], view: View, limits: dict[str, float], anchor_round: int) -> None:
    """Points that lie closely together share one place for their names."""
    seen = [point for point in points if view.holds(point.harmful, point.refusal)]
    places: list[tuple[tuple[float, float], list[str]]] = []
    for point in seen:
        word = " candidate" if point is points[-1] else " anchor" if point.round == anchor_round else ""
        at = view.place_of(point.harmful, point.refusal)
        near = next((names for other, names in places if math.dist(at, other) < _NEAR), None)
        if near is None:
            places.append((at, near := []))
        near.append(f"{point.round}{word}")
    names = [(", ".join(told), *at) for at, told in places]
    markers = [view.place_of(point.harmful, point.refusal) for point in seen]
    for (text, x, y), corner in zip(
        names, place(names, markers=markers, lines=_lines(points, view, limits), room=_ROOM), strict=True
    ):
        axes.annotate(
            text,
            (x, y),
            xycoords="axes points",
            xytext=(corner.dx, corner.dy),
            textcoords="offset points",
            horizontalalignment="left" if corner.right else "right",
            fontsize=10,
            color=INK,
            zorder=5,
        )


def _lines(points: Sequence[Point], view: View, limits: dict[str, float]) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    """All that a name should not lie on: ways, crosses and limits."""
    of = view.place_of
    ways = [(of(one.harmful, one.refusal), of(other.harmful, other.refusal)) for one, other in _ways(points)]
    across = [(of(p.harmful_ci[0], p.refusal), of(p.harmful_ci[1], p.refusal)) for p in points if p.harmful_ci]
    along = [(of(p.harmful, p.refusal_ci[0]), of(p.harmful, p.refusal_ci[1])) for p in points if p.refusal_ci]
    dashed = [
        (of(at, view.refusal[0]), of(at, view.refusal[1]))
        if name == "harmful"
        else (of(view.harmful[0], at), of(view.harmful[1], at))
        for name, at in limits.items()
    ]
    return [*ways, *across, *along, *dashed]


def _spoken(points: Sequence[Point], anchor_round: int) -> str:
    def told(point: Point) -> str:
        role = ", the candidate" if point is points[-1] else ", the anchor" if point.round == anchor_round else ""
        rates = f"{100 * point.harmful:.1f} % harmful, {100 * point.refusal:.1f} % over-refused"
        return f"round {point.round}{role}: {rates}, {'promoted' if point.promoted else 'not promoted'}"

    return "Harmful compliance and over-refusal by round. " + "; ".join(told(point) for point in points)
