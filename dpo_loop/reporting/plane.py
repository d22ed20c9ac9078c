"""Safety against usefulness: every round as a point, harmful compliance to the right, over-refusal upwards. A policy gets better towards the
lower left; one that moves along the other diagonal only trades the one for the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dpo_loop.reporting.charts import CARD, INK, LINE, MUTED, SERIES, Chart, drawing, percent_ticks
from dpo_loop.reporting.svg import StyleSheet
from dpo_loop.types import GateReport, RoundSummary

_Z = 1.959964
"""Two-sided 95 %."""


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


def plane_chart(history: Sequence[RoundSummary], gate: GateReport | None, sheet: StyleSheet) -> Chart | None:
    """Once there are two rounds to compare. Dashed: what the anchor's checks allow."""
    points = points_of(history, gate)
    if len(points) < 2:
        return None
    anchor_round = gate.anchor_round if gate else 0
    limits = _limits(points, anchor_round, gate)
    title = "Safety against over-refusal"
    with drawing(title, sheet, size=(4.4, 3.3), box=(0.15, 0.15, 0.82, 0.83), alt=_spoken(points, anchor_round)) as (
        axes,
        finished,
    ):
        _draw_ways(axes, points)
        for point in points:
            _draw_point(axes, point, is_last=point is points[-1])
        for name, at in limits.items():
            (axes.axvline if name == "harmful" else axes.axhline)(at, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _dress(axes, points, limits)
        _name_points(axes, points, anchor_round)
    note = "lower left is better; filled: promoted, hollow: kept aside; crosses are 95 % intervals"
    return Chart(title, note + ("; dashed: the most that the anchor's margins allow" if limits else ""), finished())


def _limits(points: Sequence[Point], anchor_round: int, gate: GateReport | None) -> dict[str, float]:
    anchor = next((point for point in points if point.round == anchor_round), None)
    if gate is None or anchor is None:
        return {}
    at = {"harmful_rate": ("harmful", anchor.harmful), "over_refusal_rate": ("refusal", anchor.refusal)}
    against = [check for check in gate.checks if check.rule == "non_inferior" and check.vs == "anchor" and check.metric in at]
    allowed = {at[check.metric][0]: at[check.metric][1] + check.margin for check in against}
    return {name: rate for name, rate in allowed.items() if rate < 1}


def _draw_ways(axes: Any, points: Sequence[Point]) -> None:
    """Solid from promoted to promoted policy, dotted to a candidate that was kept aside."""
    parent = points[0]
    for point in points[1:]:
        axes.annotate(
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
        parent = point if point.promoted else parent


def _draw_point(axes: Any, point: Point, *, is_last: bool) -> None:
    colour = SERIES[1] if is_last else SERIES[0]
    width = 1.4 if is_last else 0.8
    if point.harmful_ci:
        axes.plot(point.harmful_ci, [point.refusal] * 2, color=colour, linewidth=width, alpha=1 if is_last else 0.55, zorder=2)
    if point.refusal_ci:
        axes.plot([point.harmful] * 2, point.refusal_ci, color=colour, linewidth=width, alpha=1 if is_last else 0.55, zorder=2)
    axes.plot([point.harmful], [point.refusal], marker="o", markersize=9 if is_last else 7, markeredgecolor=colour, markeredgewidth=2,
              markerfacecolor=colour if point.promoted else CARD, zorder=4)  # fmt: skip


def _dress(axes: Any, points: Sequence[Point], limits: dict[str, float]) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(LINE)
    axes.grid(color=LINE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=10)
    ends = {"harmful": [0.0], "refusal": [0.0]}
    for point in points:
        ends["harmful"] += [point.harmful, *(point.harmful_ci or ())]
        ends["refusal"] += [point.refusal, *(point.refusal_ci or ())]
    for name, axis, limit in (("harmful", axes.xaxis, axes.set_xlim), ("refusal", axes.yaxis, axes.set_ylim)):
        most = max(*ends[name], limits.get(name, 0.0), 0.02)
        limit(-0.03 * most, min(1.06, 1.08 * most))
        percent_ticks(axis, num=5, digits=0 if most > 0.1 else 1)
    axes.set_xlabel("harmful compliance", color=MUTED, fontsize=10, labelpad=2)
    axes.set_ylabel("over-refusal", color=MUTED, fontsize=10, labelpad=2)


def _name_points(axes: Any, points: Sequence[Point], anchor_round: int) -> None:
    """Points that lie closely together share one place for their names."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    places: list[tuple[Point, list[str]]] = []
    for point in points:
        word = " candidate" if point is points[-1] else " anchor" if point.round == anchor_round else ""
        near = next(
            (
                names
                for other, names in places
                if abs(other.harmful - point.harmful) < 0.05 * (right - left)
                and abs(other.refusal - point.refusal) < 0.05 * (top - bottom)
            ),
            None,
        )
        if near is None:
            places.append((point, near := []))
        near.append(f"{point.round}{word}")
    for point, names in places:
        is_right, is_high = point.harmful > (left + right) / 2, point.refusal > bottom + 0.9 * (top - bottom)
        axes.annotate(
            ", ".join(names),
            (point.harmful, point.refusal),
            xytext=(-8 if is_right else 8, -15 if is_high else 7),
            textcoords="offset points",
            horizontalalignment="right" if is_right else "left",
            fontsize=10,
            color=INK,
            zorder=5,
        )


def _spoken(points: Sequence[Point], anchor_round: int) -> str:
    def told(point: Point) -> str:
        role = ", the candidate" if point is points[-1] else ", the anchor" if point.round == anchor_round else ""
        rates = f"{100 * point.harmful:.1f} % harmful, {100 * point.refusal:.1f} % over-refused"
        return f"round {point.round}{role}: {rates}, {'promoted' if point.promoted else 'not promoted'}"

    return "Harmful compliance and over-refusal by round. " + "; ".join(told(point) for point in points)
