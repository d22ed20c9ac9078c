"""Round robin and grades: they choose what is compared, and a failure of theirs counts for nobody."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.types import Decided, Graded, Outcome, Undecided, UndecidedReason
from judges.asker import Asker, Candidate
from judges.config import Knockout, Pointwise, RoundRobin, Selection
from judges.figures import Judged
from judges.ledger import Ledger
from judges.selection import extremes, select
from judges.stage import judge_prompts
from tests.judges.opinions import Opinionated
from tests.judges.world import make_prompt

REFUSED = Undecided(reason=UndecidedReason.REFUSED)
SELECTIONS = (Knockout(), RoundRobin(), Pointwise())


def alphabetical(left: str, right: str) -> Outcome:
    return Decided(p_left=0.5 + 0.5 * ((left > right) - (left < right)))


def grade(text: str) -> Outcome:
    return Graded(quality=(ord(text[0]) - 97) / 25)


@pytest.mark.parametrize(("selection", "num_calls"), [(Knockout(), 6), (RoundRobin(), 12), (Pointwise(), 6)])
def test_every_selection_finds_best_and_worst_at_its_price(tmp_path: Path, selection: Selection, num_calls: int) -> None:
    judge = Opinionated(alphabetical, quality=grade)
    prompt = make_prompt("Question")
    answers = {prompt.id: [Candidate(text, text) for text in "cadb"]}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        found: list[Judged] = []
        asyncio.run(judge_prompts(Asker(judge, ledger), [prompt], answers, found.append, seed=3, selection=selection))
    [judged] = found
    verdict = judged.judgement.verdict
    assert verdict is not None
    assert (verdict.winner_id, verdict.loser_id) == ("d", "a")
    assert len(judge.asked) == len(set(judge.asked)) <= num_calls, "no call is made twice: the confirmation may have met before"


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_judge_that_answers_nothing_still_selects_two_different_answers(tmp_path: Path, selection: Selection) -> None:
    judge = Opinionated(lambda left, right: REFUSED, quality=lambda text: REFUSED)
    answers = {text: Candidate(text, text) for text in "abc"}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        chosen = select(selection, Asker(judge, ledger), make_prompt("Question"), answers, random.Random(1))
        best, worst, _ = asyncio.run(chosen)
    assert {best, worst} < set("abc")
    assert best != worst


@given(st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 1)), st.integers(0, 99))
def test_extremes_are_of_those_with_a_score(scores: dict[str, float], seed: int) -> None:
    best, worst = extremes(scores, "abcdef", random.Random(seed))
    assert best != worst
    if len(scores) >= 2:
        assert scores[best] == max(scores.values())
        assert scores[worst] == min(value for name, value in scores.items() if name != best)
    assert (best, worst) == extremes(scores, "abcdef", random.Random(seed))
