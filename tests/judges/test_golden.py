"""The golden set is what the checks take it for: enough of every kind, each item once, and no cue but the answers themselves."""

from __future__ import annotations

import re

from judges.selftest.fitness import MIN_INJECTION_LOOKS
from judges.selftest.golden import ATTACKS, EASY, HARD, GoldenItem, Kind, load_golden, trials_of

GOLDEN = load_golden()
TRIALS = trials_of(GOLDEN)


def of(kind: Kind) -> list[GoldenItem]:
    return [item for item in GOLDEN.items if item.kind is kind]


def test_every_kind_has_what_its_check_needs() -> None:
    assert len(GOLDEN.items) >= 200
    assert {kind: len(of(kind)) for kind in Kind if kind is not Kind.INJECTION} == {
        Kind.RIGHT_WRONG: 158,
        Kind.IDENTICAL: 20,
        Kind.LENGTH_TWIN: 20,
        Kind.MARKDOWN_TWIN: 20,
        Kind.REFUSAL_PRONE: 16,
        Kind.HARMFUL: 20,
    }
    assert sum(HARD in item.tags for item in of(Kind.RIGHT_WRONG)) == 24
    assert not any({EASY, HARD} <= set(item.tags) for item in GOLDEN.items)
    for family in ATTACKS:
        assert sum(2 for trial in TRIALS if trial.family == family) >= MIN_INJECTION_LOOKS


def test_no_item_is_there_twice_and_trials_never_change_places() -> None:
    prompts = [re.sub(r"\W+", " ", item.prompt).casefold().strip() for item in GOLDEN.items]
    assert len(set(prompts)) == len(prompts)
    assert trials_of(GOLDEN) == TRIALS
    assert len({trial.id for trial in TRIALS}) == len(TRIALS)


def test_neither_length_nor_brevity_alone_tells_right_from_wrong() -> None:
    def longer(items: list[GoldenItem]) -> float:
        return sum(len(item.answers[0]) > len(item.answers[1]) for item in items) / len(items)

    graded = of(Kind.RIGHT_WRONG)
    assert 0.2 < longer(graded) < 0.5
    assert 0.3 < longer([item for item in graded if "instruction" in item.tags]) < 0.4
    assert 0.3 < longer([item for item in graded if HARD in item.tags]) < 0.4
    assert 0.2 < longer(of(Kind.HARMFUL)) < 0.5
    assert all(len(item.answers[1]) > 2 * len(item.answers[0]) for item in of(Kind.LENGTH_TWIN))


def test_markdown_twins_differ_in_decoration_alone() -> None:
    def words(text: str) -> list[str]:
        """Lists need no conjunction; the numbers of a list are decoration."""
        return [word for word in re.findall(r"[a-z]+", text.lower()) if word not in ("and", "or")]

    for item in of(Kind.MARKDOWN_TWIN):
        assert words(item.answers[0]) == words(item.answers[1]), item.id


def test_a_reference_is_the_right_answer_without_its_filler() -> None:
    filler = re.compile(r"worked through this|well established|Great question|To be thorough|Confidence|Checked|Check the result")
    for item in of(Kind.RIGHT_WRONG):
        reference = item.reference or item.answers[0]
        assert not filler.search(reference), item.id
        assert len(reference) <= len(item.answers[0])
    assert sum(bool(filler.search(item.answers[0])) for item in of(Kind.RIGHT_WRONG)) >= 25


def test_agreeing_to_help_with_harm_holds_no_help() -> None:
    """Nothing to measure, mix, buy, click or go to: the second answers are promises."""
    for item in of(Kind.HARMFUL):
        assert re.search(r"\b(will not|No)\b", item.answers[0]), item.id
        assert not re.search(r"\d|http|\b(gram|litre|click|buy|mix|tool|knife|acid|bleach|phone|address)", item.answers[1]), item.id
        assert len(item.answers[1]) < 200
