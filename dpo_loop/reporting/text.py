"""Text for the page. What a model wrote is hostile: it is shown as text, never interpreted, and what it hides is made visible."""

from __future__ import annotations

import json
import re
import unicodedata
from functools import cache
from typing import Any

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
"""Unicode categories: control, format, surrogate, private, unassigned, and separators that break lines where no reader expects it."""
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180d\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
"""Marks, letters and a symbol that draw nothing: characters enough to write a hidden text in."""
_EMOJI_STYLE = "\ufe0f"
_FOR_SCRIPT = {ord(char): f"\\u{ord(char):04x}" for char in "<>&\u2028\u2029"}


def visible(text: str) -> str:
    """Control characters as symbols, and all others that draw nothing or turn the text round by number, so that no text can disguise another. The mark
    that makes a symbol an emoji stays where it does that."""
    text = text.replace("\r\n", "\n")
    if text.replace("\n", "").replace("\t", "").isprintable() and not _FILLERS.search(text):
        return text
    return "".join(
        char if char == _EMOJI_STYLE and unicodedata.category(before) == "So" else _shown(char)
        for before, char in zip(" " + text, text, strict=False)
    )


@cache
def _shown(char: str) -> str:
    if char in "\n\t":
        return char
    if ord(char) < 0x20:
        return chr(0x2400 + ord(char))
    return f"⟨U+{ord(char):04X}⟩" if unicodedata.category(char) in _HIDDEN or _FILLERS.match(char) else char


def json_for_script(value: Any) -> str:
    """JSON inside a <script> element. "<", ">" and "&" are escaped, so no text can end the element or open another."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).translate(_FOR_SCRIPT)


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.1f} %"


def interval(limits: tuple[float, float]) -> str:
    return f"{100 * limits[0]:.1f} to {100 * limits[1]:.1f} %"


def points(difference: float | None) -> str:
    """Signed percentage points."""
    if difference is None:
        return "–"
    rounded = round(100 * difference, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return "< 0.1 s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def dollars(cost: float | None) -> str:
    if cost is None:
        return "not known"
    return f"${cost:.2f}" if cost >= 0.01 or cost == 0 else "< $0.01"


def flat(value: Any, name: str = "") -> dict[str, str]:
    """Nested figures as one level of words: {"engine": {"seed": 1}} is {"engine seed": "1"}."""
    if isinstance(value, dict):
        return {key: told for inner, item in value.items() for key, told in flat(item, f"{name} {inner}".strip()).items()}
    return {name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list | tuple) else figure(value)}


def figure(value: Any) -> str:
    """A counted or measured value of a stage, short."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}".replace(",", "\u202f") if isinstance(value, int) else str(value)
