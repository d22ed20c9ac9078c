"""Charts by matplotlib as inline SVG: text stays text, colours are the page's own, so they follow light and dark.

One small chart per question instead of one wide picture: small ones flow into a grid and stay legible on a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from dpo_loop.reporting.svg import StyleSheet, move_styles

# Colours that stand for the page's variables until the SVG is finished; matplotlib knows no var().
_VARIABLES = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--card)",
    "#050505": "var(--series-1)",
    "#060606": "var(--series-2)",
    "#070707": "var(--series-3)",
}
INK, MUTED, LINE, CARD, *SERIES = _VARIABLES
_SETTINGS = {"svg.fonttype": "none", "svg.hashsalt": "dpo-loop", "font.size": 10, "path.simplify": True}


@dataclass(frozen=True, slots=True)
class Series:
    """points: (x, y); y None or not finite leaves a gap. intervals: (low, high) per point. hollow: x whose marker is not filled.
    marked False: the line alone."""

    label: str
    points: tuple[tuple[float, float | None], ...]
    intervals: tuple[tuple[float, float] | None, ...] = ()
    hollow: frozenset[float] = field(default_factory=frozenset)
    marked: bool = True

    @property
    def known(self) -> list[tuple[float, float]]:
        return [(x, y) for x, y in self.points if y is not None and math.isfinite(y)]


@dataclass(frozen=True, slots=True)
class Chart:
    title: str
    note: str
    svg: Markup


def line_chart(
    title: str,
    series: Sequence[Series],
    sheet: StyleSheet,
    *,
    note: str = "",
    x_name: str,
    in_percent: bool = False,
    reference: float | None = None,
) -> Chart | None:
    """None where no series has a known point. in_percent: y is a rate in 0..1. reference: a value to draw a dashed line at."""
    drawn = [one for one in series if one.known]
    if not drawn:
        return None
    alt = "; ".join(_spoken(one, in_percent=in_percent) for one in drawn)
    box = (0.15, 0.17, 0.83, 0.70 if len(drawn) > 1 else 0.77)
    with drawing(title, sheet, size=(4.0, 2.4), box=box, alt=f"{title} by {x_name}. {alt}") as (axes, finished):
        for position, one in enumerate(drawn):
            _draw(axes, one, colour=SERIES[position % len(SERIES)], dashes=("-", (0, (5, 2)), (0, (1, 1.5)))[position % 3])
        if reference is not None:
            axes.axhline(reference, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        _dress(axes, x_name=x_name, in_percent=in_percent, whole_x=all(x == int(x) for one in drawn for x, _ in one.known))
        if len(drawn) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.17, 0.98), ncols=len(drawn), frameon=False, labelcolor=INK, fontsize=9,
                        handlelength=1.8, columnspacing=1.2)  # fmt: skip
    return Chart(title=title, note=note, svg=finished())


@contextmanager
def drawing(
    name: str, sheet: StyleSheet, *, size: tuple[float, float], box: tuple[float, float, float, float], alt: str
) -> Iterator[tuple[Any, Callable[[], Markup]]]:
    """Axes to draw on, and what gives the SVG once that is done. size: inches. box: of the axes in the figure: left, bottom, width, height."""
    buffer = io.StringIO()
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=size, facecolor="none")
        FigureCanvasSVG(figure)
        yield figure.add_axes(box, facecolor="none"), lambda: Markup(_inline(buffer.getvalue(), sheet, name=name, alt=alt))
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})


def _draw(axes: mpl.axes.Axes, one: Series, *, colour: str, dashes: object) -> None:
    many = len(one.known) > 40
    xs, ys = [x for x, _ in one.points], [math.nan if y is None else y for _, y in one.points]
    axes.plot(xs, ys, color=colour, linewidth=1.4 if many else 1.8, linestyle=dashes, label=one.label, zorder=3)
    for (x, y), interval in zip(one.points, one.intervals, strict=False):
        if y is not None and interval is not None:
            axes.plot([x, x], interval, color=colour, linewidth=1.2, zorder=2, solid_capstyle="butt")
    if many or not one.marked:
        return
    for x, y in one.known:
        face = CARD if x in one.hollow else colour
        axes.plot([x], [y], marker="o", markersize=5.5, markerfacecolor=face, markeredgecolor=colour, markeredgewidth=1.5, zorder=4)


def _dress(axes: mpl.axes.Axes, *, x_name: str, in_percent: bool, whole_x: bool) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelcolor=MUTED, length=0, labelsize=10)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=whole_x, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=3))
    axes.margins(x=0.05, y=0.12)
    low, high = axes.get_ylim()
    if in_percent:
        middle, reach = (low + high) / 2, max((high - low) / 2, 0.02)
        axes.set_ylim(max(middle - reach, -0.04), min(middle + reach, 1.04))
        percent_ticks(axes.yaxis, num=4, digits=0 if high - low > 0.05 else 1)
    axes.set_xlabel(x_name, color=MUTED, fontsize=9, labelpad=1, loc="right")


def percent_ticks(axis: Any, *, num: int, digits: int) -> None:
    """Ticks of a rate in 0..1."""
    axis.set_major_locator(MaxNLocator(nbins=num, steps=[1, 2, 5, 10], min_n_ticks=3))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.{digits}f} %" if 0 <= value <= 1 else ""))


def _spoken(one: Series, *, in_percent: bool) -> str:
    def number(value: float) -> str:
        return f"{100 * value:.1f} %" if in_percent else f"{value:.4g}"

    first, last = one.known[0], one.known[-1]
    return f"{one.label}: {number(first[1])} at {first[0]:g}" + (f", {number(last[1])} at {last[0]:g}" if last != first else "")


def _inline(svg: str, sheet: StyleSheet, *, name: str, alt: str) -> str:
    """Only the drawing: no prologue, name spaces, metadata or style element; ids are unique on the page; colours are variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    prefix = re.sub(r"\W+", "-", name.lower())
    referenced = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', svg))
    svg = re.sub(r'\sid="([^"]+)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in referenced else "", svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    width, height = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg).groups()  # type: ignore[union-attr]  # matplotlib writes one
    opening = f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(alt)}">'
    return move_styles(re.sub(r"\n\s*", "\n", re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)), sheet)
