from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.knockout import best_and_worst


def play(strength: dict[str, float], seed: int, *, broken: bool = False) -> tuple[str, str, int]:
    num_matches = 0

    async def match(first: str, second: str) -> float | None:
        nonlocal num_matches
        num_matches += 1
        if broken:
            return None
        return 0.5 if strength[first] == strength[second] else float(strength[first] > strength[second])

    best, worst = asyncio.run(best_and_worst(list(strength), random.Random(seed), match))
    return best, worst, num_matches


strengths = st.lists(st.integers(0, 5), min_size=2, max_size=17).map(
    lambda values: {f"c{i}": float(v) for i, v in enumerate(values)}
)


@given(strengths, st.integers(0, 2**32))
def test_a_judge_that_is_right_finds_a_strongest_and_a_weakest_however_the_draw(strength: dict[str, float], seed: int) -> None:
    best, worst, num_matches = play(strength, seed)
    assert strength[best] == max(strength.values())
    assert strength[worst] == min(strength.values())
    assert best != worst
    assert num_matches <= 2 * len(strength) - 2
    assert play(strength, seed) == (best, worst, num_matches)


@pytest.mark.parametrize("k", range(2, 10))
def test_the_one_that_waits_a_round_can_still_be_the_worst(k: int) -> None:
    """With an odd number one has no first-round match; looking only among first-round losers would miss it."""
    strength = {f"c{number}": float(number) for number in range(k)}
    assert {play(strength, seed)[:2] for seed in range(60)} == {(f"c{k - 1}", "c0")}


@given(strengths, st.integers(0, 2**32))
def test_a_judge_that_never_decides_still_leaves_two_different_answers_to_confirm(strength: dict[str, float], seed: int) -> None:
    best, worst, _ = play(strength, seed, broken=True)
    assert best != worst


def test_four_answers_cost_four_matches() -> None:
    assert {play(dict.fromkeys("abcd", 0.0) | {"a": 1.0}, seed)[2] for seed in range(50)} == {4}


def test_ties_are_kept_by_chance_and_not_by_position() -> None:
    best = [play(dict.fromkeys("abcd", 0.0), seed)[0] for seed in range(400)]
    assert all(60 < best.count(name) < 140 for name in "abcd")
