"""Live figures of a judge against values worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from dpo_loop.types import Ballot, Decided, Outcome, PromptJudgement
from judges.figures import Figures, Judged, kappa
from judges.verdict import panel_verdict_of, verdict_of

A, B, TIE = Decided(p_left=1.0), Decided(p_left=0.0), Decided(p_left=0.5)


def ballots(judge: str, prompt: str, ab: Outcome, ba: Outcome) -> tuple[Ballot, Ballot]:
    def ballot(left: str, right: str, outcome: Outcome) -> Ballot:
        return Ballot(
            key=judge + prompt + left, prompt_id=prompt, left_id=left, right_id=right, outcome=outcome, judge=judge, family=judge
        )

    a, b = f"{prompt}-a", f"{prompt}-b"
    return ballot(a, b, ab), ballot(b, a, ba)


def judged(prompt: str, *votes: tuple[str, Outcome, Outcome]) -> Judged:
    cast = [ballots(judge, prompt, ab, ba) for judge, ab, ba in votes]
    verdict = verdict_of(*cast[0]) if len(cast) == 1 else panel_verdict_of(cast, min_families=1)
    judgement = PromptJudgement(prompt_id=prompt, best_id=f"{prompt}-a", worst_id=f"{prompt}-b", verdict=verdict)
    return Judged(judgement, tuple(ballot for pair in cast for ballot in pair), ())


def figures(items: list[Judged], lengths: dict[str, int]) -> dict[str, Any]:
    added = Figures(lengths)
    for item in items:
        added.add(item)
    return added.metrics()


def test_a_judge_that_likes_length_shows() -> None:
    items = [judged("p", ("j", A, B)), judged("q", ("j", A, B)), judged("r", ("j", B, A)), judged("s", ("j", A, A))]
    lengths = {"p-a": 9, "p-b": 5, "q-a": 7, "q-b": 3, "r-a": 6, "r-b": 2, "s-a": 1, "s-b": 5}
    seen = figures(items, lengths)
    assert seen["longer_win_rate"] == pytest.approx(2 / 3)
    # Differences 4, 4, 4, -4: all of spread 4, so x = tanh(1) · (1, 1, 1, -1) and y = (.5, .5, -.5, 0).
    assert seen["length_slope"] == pytest.approx(0.5 * math.tanh(1) / (4 * math.tanh(1) ** 2))
    assert (seen["consistency"], seen["first_position_win_rate"]) == (0.75, 5 / 8)


def test_lengths_that_never_differ_say_nothing() -> None:
    seen = figures([judged("p", ("j", A, B))], {"p-a": 4, "p-b": 4})
    assert (seen["length_slope"], seen["longer_win_rate"]) == (None, None)
    assert figures([], {})["yield"] is None


def test_agreement_is_told_for_each_two_judges() -> None:
    items = [
        judged("p", ("x", A, B), ("y", A, B)),
        judged("q", ("x", A, B), ("y", B, A)),
        judged("r", ("x", B, A), ("y", B, A)),
        judged("s", ("x", TIE, TIE), ("y", A, A)),
    ]
    found = figures(items, {})["agreement"]
    assert list(found) == ["x and y"]
    # Words of x: best 2, worst 1, neither 1; of y: best 1, worst 2, neither 1. Chance = (2 + 2 + 1) / 16, seen 3 / 4.
    assert found["x and y"] == {"num": 4, "agree": 0.75, "kappa": pytest.approx((0.75 - 5 / 16) / (1 - 5 / 16))}
    assert "agreement" not in figures([judged("p", ("x", A, B))], {})


def test_two_members_of_a_panel_may_be_the_same_model_at_two_places() -> None:
    found = figures([judged("p", ("x", A, B), ("x", A, B))], {})["agreement"]
    assert found["x and x (2)"]["agree"] == 1.0


def test_kappa_knows_chance() -> None:
    assert kappa(Counter([("a", "a"), ("b", "b")])) == 1.0
    assert kappa(Counter([("a", "a"), ("a", "b"), ("b", "a"), ("b", "b")])) == 0.0
    assert kappa(Counter([("a", "a")])) is None
    assert kappa(Counter([])) is None
