"""A panel: what its votes mean, whom it asks, and that no failure of any member makes a label."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dpo_loop.types import Ballot, Decided, Outcome, Undecided, UndecidedReason, VerdictKind
from judges.accounts import Accounts
from judges.asker import Asker, Candidate
from judges.budget import Purse
from judges.config import PanelJudge
from judges.ledger import Ledger
from judges.panel import Panel
from judges.verdict import panel_verdict_of, verdict_of
from tests.judges.opinions import Opinion, Opinionated
from tests.judges.world import make_prompt

FAMILIES = ("gpt", "claude", "qwen", "llama")
outcomes = st.one_of(
    st.sampled_from([0.0, 0.5, 1.0]).map(lambda p: Decided(p_left=p)),
    st.floats(0, 1).map(lambda p: Decided(p_left=p)),
    st.sampled_from(UndecidedReason).map(lambda reason: Undecided(reason=reason)),
)
members = st.lists(st.tuples(st.sampled_from(FAMILIES), outcomes, outcomes), min_size=1, max_size=5)
needed = st.integers(1, 3)


def vote(family: str, ab: Outcome, ba: Outcome) -> tuple[Ballot, Ballot]:
    def ballot(left: str, right: str, outcome: Outcome) -> Ballot:
        return Ballot(
            key=f"{family}{left}{right}", prompt_id="p", left_id=left, right_id=right, outcome=outcome, judge=family, family=family
        )

    return ballot("a", "b", ab), ballot("b", "a", ba)


def opposite(outcome: Outcome) -> Outcome:
    return Decided(p_left=1 - outcome.p_left) if isinstance(outcome, Decided) else outcome


A, B, TIE = Decided(p_left=1.0), Decided(p_left=0.0), Decided(p_left=0.5)
NONE = Undecided(reason=UndecidedReason.UNAVAILABLE)


@pytest.mark.parametrize(
    ("votes", "kind", "winner", "margin"),
    [
        ([("gpt", A, B), ("claude", A, B)], VerdictKind.WINNER, "a", 1.0),
        ([("gpt", A, B), ("claude", A, B), ("qwen", B, A)], VerdictKind.WINNER, "a", 1 / 3),
        ([("gpt", A, B), ("claude", B, A)], VerdictKind.INCONSISTENT, None, 0.0),
        ([("gpt", A, A), ("claude", A, B)], VerdictKind.INCONSISTENT, None, 0.5),
        ([("gpt", TIE, TIE), ("claude", TIE, TIE)], VerdictKind.TIE, None, 0.0),
        ([("gpt", TIE, TIE), ("claude", A, B)], VerdictKind.WEAK, None, 0.5),
        ([("gpt", A, B), ("claude", NONE, B)], VerdictKind.UNDECIDED, None, 0.0),
        ([("gpt", A, B), ("claude", NONE, NONE), ("qwen", A, B)], VerdictKind.WINNER, "a", 1.0),
        ([("gpt", A, B), ("gpt", A, B), ("gpt", A, B)], VerdictKind.UNDECIDED, None, 0.0),
        ([("gpt", A, B), ("gpt", A, B), ("claude", B, A)], VerdictKind.INCONSISTENT, None, 0.0),
        ([("gpt", A, B), ("gpt", B, A), ("claude", B, A)], VerdictKind.WEAK, None, 0.5),
    ],
)
def test_what_votes_mean(votes: list[Any], kind: VerdictKind, winner: str | None, margin: float) -> None:
    verdict = panel_verdict_of([vote(*one) for one in votes], min_families=2)
    assert (verdict.kind, verdict.winner_id) == (kind, winner)
    assert verdict.margin == pytest.approx(margin)
    assert len(verdict.ballot_keys) == 2 * len(votes)


@given(members, needed)
def test_a_winner_has_the_mean_and_more_than_half_of_enough_families(votes: list[Any], min_families: int) -> None:
    verdict = panel_verdict_of([vote(*one) for one in votes], min_families=min_families)
    decided = {family for family, ab, ba in votes if isinstance(ab, Decided) and isinstance(ba, Decided)}
    assert (verdict.kind is VerdictKind.UNDECIDED) == (len(decided) < min_families)
    if verdict.winner_id is None:
        return
    assert verdict.p_a is not None
    assert (verdict.winner_id == "a") == (verdict.p_a > 0.5)
    behind = {one[0] for one in votes if verdict_of(*vote(*one)).winner_id == verdict.winner_id}
    assert len(behind) * 2 > len(decided)


@given(members, needed)
def test_flipping_all_judges_flips_the_label_and_their_order_does_nothing(votes: list[Any], min_families: int) -> None:
    verdict = panel_verdict_of([vote(*one) for one in votes], min_families=min_families)
    flipped = panel_verdict_of([vote(family, opposite(ab), opposite(ba)) for family, ab, ba in votes], min_families=min_families)
    assert {"a": "b", "b": "a", None: None}[verdict.winner_id] == flipped.winner_id
    again = panel_verdict_of([tuple(reversed(vote(*one))) for one in reversed(votes)], min_families=min_families)  # type: ignore[misc]
    assert (again.kind, again.winner_id) == (verdict.kind, verdict.winner_id)


@given(outcomes, outcomes)
def test_a_panel_of_one_is_that_judge(ab: Outcome, ba: Outcome) -> None:
    one = vote("gpt", ab, ba)
    assert panel_verdict_of([one], min_families=1) == verdict_of(*one)


def test_votes_on_different_pairs_are_refused() -> None:
    first, second = vote("gpt", A, B), vote("claude", A, B)
    other = tuple(ballot.model_copy(update={"prompt_id": "q"}) for ballot in second)
    with pytest.raises(ValueError, match="same pair"):
        panel_verdict_of([first, other], min_families=1)  # type: ignore[list-item]


# ------------------------------------------------------------------------------------------------------------- asking


def longer(left: str, right: str) -> Outcome:
    return Decided(p_left=float(len(left) > len(right)))


def shorter(left: str, right: str) -> Outcome:
    return Decided(p_left=float(len(left) < len(right)))


def fails(left: str, right: str) -> Outcome:
    return Undecided(reason=UndecidedReason.UNAVAILABLE)


def first(left: str, right: str) -> Outcome:
    return Decided(p_left=1.0)


def run_panel(folder: Path, *opinions: Opinion, min_families: int = 2) -> tuple[list[int], VerdictKind, dict[str, Any]]:
    """Calls of each judge for one label, the verdict's kind, the panel's figures."""
    judges = [Opinionated(opinion, name=str(n), family=FAMILIES[n], is_instant=False) for n, opinion in enumerate(opinions)]
    config = PanelJudge(
        kind="panel", judges=tuple(member(family) for family in FAMILIES[: len(opinions)]), min_families=min_families
    )  # type: ignore[arg-type]

    async def run() -> tuple[list[int], VerdictKind, dict[str, Any]]:
        with Ledger(folder / "ledger.sqlite") as ledger:
            purse = await Purse.open(ledger, Accounts(ledger.path))
            panel = Panel(config, [Asker(judge, ledger) for judge in judges], purse)
            looked = await panel.ask(make_prompt("Say hello"), Candidate("a", "hello"), Candidate("b", "hi"))
            assert looked.judge == next((str(n) for n, opinion in enumerate(opinions) if opinion is not fails), looked.judge)
            for judge in judges:
                judge.asked.clear()
            verdict, ballots = await panel.both_orders(make_prompt("Say bye"), Candidate("a", "hello"), Candidate("b", "hi"))
            votes = list(zip(ballots[::2], ballots[1::2], strict=True))
            assert panel_verdict_of(votes, min_families=min_families) == verdict, "it is recomputed from what is stored"
            return [len(judge.asked) for judge in judges], verdict.kind, panel.figures()

    return asyncio.run(run())


def member(family: str) -> dict[str, Any]:
    return {"kind": "openai", "model": "m", "family": family}


@pytest.mark.parametrize(
    ("opinions", "calls", "kind", "escalated"),
    [
        ((longer, longer, longer), [2, 2, 0], VerdictKind.WINNER, 0.0),
        ((longer, shorter, longer), [2, 2, 2], VerdictKind.WINNER, 1.0),
        ((first, longer, longer), [2, 2, 2], VerdictKind.WINNER, 1.0),
        ((fails, longer, longer), [2, 2, 2], VerdictKind.WINNER, 1.0),
        ((fails, fails, longer), [2, 2, 2], VerdictKind.UNDECIDED, 1.0),
        ((first, first, longer), [2, 2, 2], VerdictKind.INCONSISTENT, 1.0),
    ],
)
def test_a_further_judge_is_asked_only_where_the_first_do_not_settle_it(
    tmp_path: Path, opinions: tuple[Opinion, ...], calls: list[int], kind: VerdictKind, escalated: float
) -> None:
    assert run_panel(tmp_path, *opinions)[:2] == (calls, kind)
    _, _, told = run_panel(tmp_path, *opinions)
    assert told["escalated"] == escalated
    assert told["calls_asked"] + told["calls_from_ledger"] == sum(
        one["calls_asked"] + one["calls_from_ledger"] for one in told["judges"]
    )


def test_a_cheap_judge_may_be_enough_where_one_family_is(tmp_path: Path) -> None:
    assert run_panel(tmp_path, longer, longer, min_families=1)[:2] == ([2, 0], VerdictKind.WINNER)


@pytest.mark.parametrize(
    ("families", "words"), [(["gpt", ""], r"judges\.1\.family is missing"), (["gpt", "gpt"], "of 1 families and min_families is 2")]
)
def test_a_panel_without_families_is_refused(families: list[str], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        PanelJudge(kind="panel", judges=tuple(member(family) for family in families))  # type: ignore[arg-type]
