"""Answers that are broken whatever was asked: empty, unreadable, looping, echoing the prompt, leaking the chat template.

Deterministic and without a model. Thresholds leave ordinary text alone: an answer of a few words is never a loop, and a list, a table
or a chorus that ends by itself must repeat more than half of itself before it counts.
"""

from __future__ import annotations

import re
import unicodedata
from enum import StrEnum

from dpo_loop.types import FinishReason

_TEMPLATE_MARK = re.compile(
    r"<\|[a-z_]{2,24}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<\|(?:im_start|im_end)", re.IGNORECASE
)
_TAIL_CHARS = 512
_LONGEST_UNIT = 128


class Degeneration(StrEnum):
    EMPTY = "empty"
    UNREADABLE = "unreadable"
    LOOPING = "looping"
    ECHO = "echo"
    TEMPLATE = "template"


def degeneration_of(text: str, finish_reason: FinishReason, *, prompt: str | None = None) -> Degeneration | None:
    """What is broken about an answer, None for an ordinary one. prompt: the last user turn, to recognise an answer that repeats it."""
    if (found := _unreadable(text)) is not None:
        return found
    if _TEMPLATE_MARK.search(text):
        return Degeneration.TEMPLATE
    if _loops(text, finish_reason):
        return Degeneration.LOOPING
    if prompt is not None and _echoes(text, prompt):
        return Degeneration.ECHO
    return None


def _unreadable(text: str) -> Degeneration | None:
    solid = "".join(text.split())
    if solid and solid.isprintable() and "\ufffd" not in solid:
        return None  # nearly every answer: no look at single characters
    categories = [unicodedata.category(char) for char in solid]
    num_visible = sum(category not in ("Cc", "Cf") for category in categories)
    if num_visible == 0:
        return Degeneration.EMPTY
    num_broken = solid.count("\ufffd") + sum(category in ("Cc", "Cn", "Co", "Cs") for category in categories)
    return Degeneration.UNREADABLE if num_broken > 0.3 * len(solid) else None


def repeat_ratio(text: str) -> tuple[float, int]:
    """Share of word 4-grams that occurred before, and how many 4-grams there are."""
    words = text.split()
    num_grams = len(words) - 3
    if num_grams < 1:
        return 0.0, 0
    return 1 - len(set(zip(words, words[1:], words[2:], words[3:], strict=False))) / num_grams, num_grams


def tail_repeats(text: str) -> tuple[int, int]:
    """How the text ends: (characters covered by one unit repeated to the end, length of that unit); (0, 0) if it does not repeat.

    The unit may be cut off in the middle, as an answer that ran out of tokens is. Borders of the reversed tail by the
    Knuth-Morris-Pratt failure function: a prefix of length m with longest border k has period m - k.
    """
    tail = text.rstrip()[-_TAIL_CHARS:][::-1]
    borders = [0] * len(tail)
    best = (0, 0)
    k = 0
    for index in range(1, len(tail)):
        while k and tail[index] != tail[k]:
            k = borders[k - 1]
        k += tail[index] == tail[k]
        borders[index] = k
        unit = index + 1 - k
        if unit <= _LONGEST_UNIT and index + 1 >= 4 * unit:
            best = (index + 1, unit)
    return best


def _loops(text: str, finish_reason: FinishReason) -> bool:
    ratio, num_grams = repeat_ratio(text)
    if finish_reason is FinishReason.STOP:
        return num_grams >= 32 and ratio > 0.5
    covered, _ = tail_repeats(text)
    whole = min(len(text.rstrip()), _TAIL_CHARS)
    return (num_grams >= 8 and ratio > 0.3) or (covered >= 24 and covered >= whole / 2)


def _echoes(text: str, prompt: str) -> bool:
    """The answer is the whole question again. Short questions are left alone: their words may be the answer."""
    words = prompt.casefold().split()
    return len(words) >= 4 and text.casefold().split() == words
