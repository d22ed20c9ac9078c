from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.degenerate import Degeneration, degeneration_of, repeat_ratio, tail_repeats
from dpo_loop.types import FinishReason

STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH

ORDINARY = [
    "yes",
    "7",
    "?",
    "apple bird cloud",
    "APPLE",
    "apple-bird-cloud",
    "owl owl owl",
    "amber road amber road amber road",
    "ha ha ha ha ha ha",
    "I can't help with that.",
    "No.\n\n1. first\n2. second\n3. third",
    "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |",
    "def f(x):\n    return [[1, 0, 0], [0, 1, 0], [0, 0, 1]]",
    "Пожалуйста, сначала прочитайте этикетку.",
    "まず説明書を読んでください。",
    "List<|V|> is not a template mark, a < b | c > d is none either",
    "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36 37 38 39 40",
]


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_answers_are_not_flagged(text: str) -> None:
    assert degeneration_of(text, STOP, prompt="say: apple bird cloud") is None


@pytest.mark.parametrize("text", [text for text in ORDINARY if len(text) < 60])
def test_a_cut_off_answer_is_not_degenerate_unless_it_repeats(text: str) -> None:
    assert degeneration_of(text, LENGTH) is None


@pytest.mark.parametrize(
    ("text", "reason", "kind"),
    [
        ("", STOP, Degeneration.EMPTY),
        (" \n\t ", STOP, Degeneration.EMPTY),
        ("\u200b\u2060\x00", STOP, Degeneration.EMPTY),
        ("\ufffd\ufffd\ufffd ab", STOP, Degeneration.UNREADABLE),
        ("ok<|im_start|>user", STOP, Degeneration.TEMPLATE),
        ("[INST] and so on", STOP, Degeneration.TEMPLATE),
        ("<|assistant|> apple", STOP, Degeneration.TEMPLATE),
        ("the cat " * 40, LENGTH, Degeneration.LOOPING),
        ("Sure! " + "owl " * 9, LENGTH, Degeneration.LOOPING),
        ("a" * 60, LENGTH, Degeneration.LOOPING),
        ("说明书" * 20, LENGTH, Degeneration.LOOPING),
        ("a good start, then " + "it goes on and " * 20 + "it goe", LENGTH, Degeneration.LOOPING),
        ("I am sorry. " * 40, STOP, Degeneration.LOOPING),
        ("Please sort: apple bird cloud", STOP, Degeneration.ECHO),
        ("please  SORT: apple bird cloud\n", STOP, Degeneration.ECHO),
    ],
)
def test_broken_answers_are_recognised(text: str, reason: FinishReason, kind: Degeneration) -> None:
    assert degeneration_of(text, reason, prompt="Please sort: apple bird cloud") is kind


def test_an_echo_needs_the_prompt_to_be_seen() -> None:
    assert degeneration_of("Please sort: apple bird cloud", STOP) is None


def test_answers_of_random_words_are_ordinary_at_any_length() -> None:
    rng = Random(3)
    for size in range(1, 200):
        words = " ".join(rng.choice(("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")) for _ in range(size))
        assert degeneration_of(words, STOP) is None
        assert degeneration_of(words, LENGTH) is None


@given(st.text(max_size=300), st.sampled_from(FinishReason), st.none() | st.text(max_size=40))
def test_every_text_has_an_outcome(text: str, reason: FinishReason, prompt: str | None) -> None:
    degeneration_of(text, reason, prompt=prompt)
    ratio, _ = repeat_ratio(text)
    assert 0 <= ratio < 1
    covered, unit = tail_repeats(text)
    assert covered >= 4 * unit
    if unit:
        tail = text.rstrip()[-covered:]
        assert all(tail[i] == tail[i + unit] for i in range(covered - unit))
