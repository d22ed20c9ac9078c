from __future__ import annotations

import itertools
import re

import pytest

from dpo_loop.reporting.svg import StyleSheet, interval_of_check, move_styles, share_bar
from dpo_loop.types import CheckResult, GateState


def check(metric: str, rule: str, *, estimate: float | None, low: float, high: float, margin: float) -> CheckResult:
    paired = rule == "non_inferior"
    return CheckResult(id="it", metric=metric, rule=rule, vs="previous", num_prompts=100, value=estimate, reference=None,
                       delta=estimate if paired else None, ci_low=low, ci_high=high, margin=margin, state=GateState.PASS, why="")  # fmt: skip


def drawn(result: CheckResult) -> dict[str, tuple[float, float]]:
    """Left and right end of each part, in units of the drawing."""
    svg = interval_of_check(result)
    assert svg is not None
    number = r"([-\d.]+)"
    parts = {name: (float(a), float(b)) for name, a, b in re.findall(rf'<line class="(\w+)" x1="{number}" x2="{number}"', svg)}
    left, width = (float(part) for part in re.findall(rf'class="forbidden" x="{number}" y="0" width="{number}"', svg)[0])
    dot = float(re.findall(rf'cx="{number}"', svg)[0])
    return parts | {"forbidden": (left, left + width), "dot": (dot, dot)}


@pytest.mark.parametrize(
    ("metric", "rule", "estimate", "low", "high", "margin", "forbidden_to_the_right"),
    [
        ("harmful_rate", "non_inferior", 0.0, -0.02, 0.02, 0.05, True),
        ("pass_rate", "non_inferior", 0.1, 0.05, 0.15, 0.05, False),
        ("win_rate", "non_inferior", 0.1, 0.05, 0.15, 0.05, False),
        ("degenerate_rate", "ceiling", 0.0, 0.0, 0.01, 0.03, True),
        ("win_rate", "floor", 0.55, 0.5, 0.6, 0.45, False),
    ],
)
def test_the_interval_lies_beside_the_forbidden_ground_where_the_check_passes(
    metric: str, rule: str, estimate: float, low: float, high: float, margin: float, forbidden_to_the_right: bool
) -> None:
    parts = drawn(check(metric, rule, estimate=estimate, low=low, high=high, margin=margin))
    bar, ground, limit = parts["bar"], parts["forbidden"], parts["limit"][0]
    assert bar[0] <= parts["dot"][0] <= bar[1]
    if forbidden_to_the_right:
        assert bar[1] < limit == ground[0] < ground[1] == 240
    else:
        assert 0 == ground[0] < ground[1] == limit < bar[0]
    if rule == "non_inferior":
        assert (limit > parts["zero"][0]) is forbidden_to_the_right


def ticks(result: CheckResult) -> list[tuple[float, str]]:
    return sorted(
        (float(x), text)
        for x, text in re.findall(r'<text class="tick[^"]*" x="([-\d.]+)"[^>]*>([^<]+)<', interval_of_check(result) or "")
    )


@pytest.mark.parametrize("metric", ["harmful_rate", "pass_rate"])
@pytest.mark.parametrize(("low", "high"), [(-0.4, -0.3), (-0.01, 0.01), (0.3, 0.4), (-0.99, 0.99)])
@pytest.mark.parametrize("margin", [0.0, 0.005, 0.05, 0.2])
def test_zero_and_the_limit_are_always_told_and_no_figure_covers_another(
    metric: str, low: float, high: float, margin: float
) -> None:
    found = ticks(check(metric, "non_inferior", estimate=(low + high) / 2, low=low, high=high, margin=margin))
    limit = f"{'−' if metric == 'pass_rate' else '+'}{100 * margin:.1f}" if margin else "0.0"
    assert {"0", limit} <= {text for _, text in found}
    for (left, text), (right, other) in itertools.pairwise(found):
        assert right - left >= 6 * (len(text) + len(other)) / 2
    assert all(3 * len(text) <= x <= 240 - 3 * len(text) for x, text in found)


def test_the_estimate_is_told_where_there_is_room() -> None:
    def told(estimate: float) -> bool:
        shown = ticks(
            check("degenerate_rate", "ceiling", estimate=estimate, low=estimate - 0.001, high=estimate + 0.001, margin=0.03)
        )
        return f"{100 * estimate:.1f} %" in [text for _, text in shown]

    assert told(0.002)
    assert not told(0.0295)


def test_what_was_not_measured_is_not_drawn() -> None:
    assert interval_of_check(check("pass_rate", "non_inferior", estimate=None, low=0, high=0, margin=0.05)) is None


def test_equal_styles_share_a_class_and_leave_no_attribute() -> None:
    sheet = StyleSheet()
    moved = move_styles('<g style="fill: red"><a style="fill: red"/><b style="fill: blue"/></g>', sheet)
    assert moved == '<g class="s0"><a class="s0"/><b class="s1"/></g>'
    assert sheet.css == ".s0{fill: red}\n.s1{fill: blue}"


def test_a_share_outside_its_range_is_drawn_at_the_end() -> None:
    assert 'width="100' in share_bar(7.0)
    assert 'width="0' in share_bar(-1.0)
