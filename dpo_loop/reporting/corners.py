"""Where the names of points go: beside their point, in the corner where they cover least."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_GAP = 7.0
_CHAR = 0.6
"""Width of a character in heights of the font: browsers choose the font, so this is on the wide side."""
_STEP = 2.0
"""Of the dots that a line is taken as."""
_MARGIN = 2.0

Box = tuple[float, float, float, float]
"""left, bottom, right, top."""


@dataclass(frozen=True, slots=True)
class Corner:
    """of: the offset of the text from its point. right: the text begins there, otherwise it ends there."""

    dx: float
    dy: float
    right: bool
    box: Box


def place(
    names: Sequence[tuple[str, float, float]],
    *,
    markers: Sequence[tuple[float, float]],
    lines: Sequence[tuple[tuple[float, float], tuple[float, float]]],
    room: tuple[float, float],
    font: float = 10.0,
    radius: float = 5.0,
) -> list[Corner]:
    """A corner for each (text, x, y), in their order. All lengths are in the unit of `room`, the width and height of the drawing, from its lower left."""
    dots = [dot for line in lines for dot in _dots(line)]
    taken: list[Box] = []
    found = []
    for text, x, y in names:

        def cost(corner: Corner) -> float:
            others = sum(_covered(corner.box, marker, radius) for marker in markers)
            crossed = sum(_covered(corner.box, dot, _MARGIN) for dot in dots)
            under = sum(_overlap(corner.box, box) for box in taken)
            return 30 * others + crossed + 5 * under + 1000 * _outside(corner.box, room) + 0.1 * math.hypot(corner.dx, corner.dy)

        best = min(_corners(text, x, y, font=font), key=cost)
        taken.append(best.box)
        found.append(best)
    return found


def _corners(text: str, x: float, y: float, *, font: float) -> Iterator[Corner]:
    """Upper right first, and further out where it is crowded beside the point."""
    width = _CHAR * font * len(text)
    for gap in (_GAP, 2 * _GAP, 3.5 * _GAP):
        for right, up in ((True, True), (True, False), (False, True), (False, False)):
            dx, dy = gap if right else -gap, gap * 0.6 if up else -gap * 0.6 - 0.8 * font
            left = x + dx if right else x + dx - width
            yield Corner(dx, dy, right, (left, y + dy, left + width, y + dy + 0.8 * font))


def _dots(line: tuple[tuple[float, float], tuple[float, float]]) -> Iterator[tuple[float, float]]:
    (x0, y0), (x1, y1) = line
    num = max(1, math.ceil(math.hypot(x1 - x0, y1 - y0) / _STEP))
    return ((x0 + (x1 - x0) * i / num, y0 + (y1 - y0) * i / num) for i in range(num + 1))


def _covered(box: Box, dot: tuple[float, float], radius: float) -> bool:
    return box[0] - radius < dot[0] < box[2] + radius and box[1] - radius < dot[1] < box[3] + radius


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return wide * high if wide > 0 and high > 0 else 0.0


def _outside(box: Box, room: tuple[float, float]) -> float:
    return max(0.0, -box[0]) + max(0.0, -box[1]) + max(0.0, box[2] - room[0]) + max(0.0, box[3] - room[1])
