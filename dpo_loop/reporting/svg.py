"""Inline SVG without inline styles, so that the page's security policy needs no exception for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html import escape
from itertools import pairwise

from dpo_loop.config import HIGHER_IS_BETTER
from dpo_loop.reporting.text import visible
from dpo_loop.types import CheckResult


class StyleSheet:
    """Collects declarations into classes; equal declarations share one."""

    def __init__(self) -> None:
        self._class_of: dict[str, str] = {}

    def class_for(self, declarations: str) -> str:
        return self._class_of.setdefault(declarations, f"s{len(self._class_of)}")

    @property
    def css(self) -> str:
        return "\n".join(f".{name}{{{declarations}}}" for declarations, name in self._class_of.items())


def move_styles(svg: str, sheet: StyleSheet) -> str:
    """Every style="…" attribute becomes a class of `sheet`."""
    return re.sub(r'\sstyle="([^"]*)"', lambda match: f' class="{sheet.class_for(match[1].strip())}"', svg)


WIDTH, HEIGHT, _PAD = 240, 40, 14
_APART = 6.0


def interval_of_check(check: CheckResult) -> str | None:
    """A check's interval against its margin: forbidden ground shaded, limit dashed, no change as a thin line. None: not measured."""
    estimate = check.delta if check.rule == "non_inferior" else check.value
    if estimate is None or check.ci_low is None or check.ci_high is None:
        return None
    more_is_better = check.metric in HIGHER_IS_BETTER
    paired = check.rule == "non_inferior"
    limit = -check.margin if paired and more_is_better else check.margin
    low, high = _range(check, limit)

    def x(value: float) -> float:
        return round(_PAD + (WIDTH - 2 * _PAD) * (value - low) / (high - low), 1)

    forbidden = (0.0, x(limit)) if more_is_better else (x(limit), float(WIDTH))
    label = _spoken(check, estimate, limit)
    ticks = [("tick", x(limit), _number(limit, signed=paired))]
    if paired:
        ticks.append(("tick", x(0), "0"))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="interval {check.state.value.lower()}" role="img" aria-label="{escape(label)}">',
        f"<title>{escape(label)}</title>",
        f'<rect class="forbidden" x="{forbidden[0]}" y="0" width="{round(forbidden[1] - forbidden[0], 1)}" height="26"/>',
        f'<line class="limit" x1="{x(limit)}" x2="{x(limit)}" y1="0" y2="26"/>',
        f'<line class="zero" x1="{x(0)}" x2="{x(0)}" y1="0" y2="26"/>' if paired else "",
        *_labels(ticks, ("tick estimate", x(estimate), _number(estimate, signed=paired))),
        f'<line class="bar" x1="{x(check.ci_low)}" x2="{max(x(check.ci_high), x(check.ci_low) + 2)}" y1="13" y2="13"/>',
        f'<circle class="dot" cx="{x(estimate)}" cy="13" r="4.5"/>',
        "</svg>",
    ]
    return "".join(parts)


def _range(check: CheckResult, limit: float) -> tuple[float, float]:
    assert check.ci_low is not None
    assert check.ci_high is not None
    if check.rule == "non_inferior":
        reach = max(abs(limit) * 1.6, abs(check.ci_low) * 1.08, abs(check.ci_high) * 1.08, 0.01)
        return -reach, reach
    low, high = min(check.ci_low, limit), max(check.ci_high, limit)
    room = max(0.25 * (high - low), 0.005)
    return max(0.0, low - room), min(1.0, high + room)


def _number(value: float, *, signed: bool) -> str:
    if not signed:
        return f"{100 * value:.1f} %"
    rounded = round(100 * value, 1)
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


Tick = tuple[str, float, str]
"""class, x, text."""


def _labels(ticks: Sequence[Tick], estimate: Tick) -> Iterator[str]:
    """Limit and zero always, side by side where they are close; the estimate where it leaves them alone."""
    placed = [(name, _inside(x, text), text) for name, x, text in sorted(ticks, key=lambda tick: tick[1])]
    for left, right in pairwise(range(len(placed))):
        lack = (_width(placed[left][2]) + _width(placed[right][2])) / 2 + _APART - (placed[right][1] - placed[left][1])
        if lack > 0:  # each gives way by half, but no further than the drawing goes
            for index, by in ((left, -lack / 2), (right, lack / 2)):
                name, at, text = placed[index]
                placed[index] = (name, _inside(at + by, text), text)
    name, x, text = estimate
    at = _inside(x, text)
    if all(abs(at - other) >= (_width(text) + _width(said)) / 2 + _APART for _, other, said in placed):
        placed.append((name, at, text))
    for name, at, text in placed:
        yield f'<text class="{name}" x="{round(at, 1)}" y="38" text-anchor="middle">{text}</text>'


def _inside(x: float, text: str) -> float:
    return min(max(x, _width(text) / 2), WIDTH - _width(text) / 2)


def _width(text: str) -> float:
    """Of a tick's text, on the wide side."""
    return 6.6 * len(text)


def _spoken(check: CheckResult, estimate: float, limit: float) -> str:
    unit = "points" if check.rule == "non_inferior" and check.metric != "perplexity" else "percent"
    return (
        f"{visible(check.id)}: {100 * estimate:.1f} {unit}, interval {100 * (check.ci_low or 0):.1f} to {100 * (check.ci_high or 0):.1f}, "
        f"limit {100 * limit:.1f}: {check.state.value}"
    )


def share_bar(share: float) -> str:
    """A thin bar of a length in 0..1, for a figure that stands beside it."""
    width = round(100 * min(max(share, 0.0), 1.0), 1)
    return f'<svg class="share" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true"><rect width="{width}" height="6"/></svg>'
