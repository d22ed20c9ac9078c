"""Pure rules: what two ballots mean, and that nothing but a decision in both orders can become a label."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.types import Ballot, Decided, Outcome, Undecided, UndecidedReason, VerdictKind
from judges.backend import JudgeRequest
from judges.ballot import parse_reply
from judges.verdict import verdict_of
from tests.judges.world import make_prompt

probabilities = st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1))
decided = probabilities.map(lambda p: Decided(p_left=p))
undecided = st.sampled_from(UndecidedReason).map(lambda reason: Undecided(reason=reason))
outcomes = st.one_of(decided, undecided)


def ballot(left: str, right: str, outcome: Outcome) -> Ballot:
    return Ballot(key=f"{left}{right}", prompt_id="p", left_id=left, right_id=right, outcome=outcome, judge="j")


def parse_verdict(text: str) -> Outcome:
    return parse_reply(text, JudgeRequest(key="k", prompt=make_prompt("Say hello"), left="hello", right="bye"))


def flipped(outcome: Outcome) -> Outcome:
    return Decided(p_left=1 - outcome.p_left) if isinstance(outcome, Decided) else outcome


@pytest.mark.parametrize(
    ("p_ab", "p_ba", "kind", "winner", "p_a", "margin"),
    [
        (1.0, 0.0, VerdictKind.WINNER, "a", 1.0, 1.0),
        (0.0, 1.0, VerdictKind.WINNER, "b", 0.0, 1.0),
        (0.5, 0.5, VerdictKind.TIE, None, 0.5, 0.0),
        (1.0, 1.0, VerdictKind.INCONSISTENT, None, 0.5, 0.0),
        (0.0, 0.0, VerdictKind.INCONSISTENT, None, 0.5, 0.0),
        (1.0, 0.5, VerdictKind.WEAK, None, 0.75, 0.5),
        (0.5, 1.0, VerdictKind.WEAK, None, 0.25, 0.5),
        (0.75, 0.25, VerdictKind.WINNER, "a", 0.75, 0.5),
        (0.9375, 0.5625, VerdictKind.INCONSISTENT, None, 0.6875, 0.375),
    ],
)
def test_the_table_of_verdicts(p_ab: float, p_ba: float, kind: VerdictKind, winner: str | None, p_a: float, margin: float) -> None:
    verdict = verdict_of(ballot("a", "b", Decided(p_left=p_ab)), ballot("b", "a", Decided(p_left=p_ba)))
    assert (verdict.kind, verdict.winner_id, verdict.p_a, verdict.margin) == (kind, winner, p_a, margin)
    assert verdict.ballot_keys == ("ab", "ba")


@given(outcomes, outcomes)
def test_presentation_order_never_changes_the_verdict(first: Outcome, second: Outcome) -> None:
    one, other = ballot("a", "b", first), ballot("b", "a", second)
    assert verdict_of(one, other) == verdict_of(other, one)


@given(outcomes, outcomes)
def test_naming_the_answers_the_other_way_round_gives_the_same_winner(first: Outcome, second: Outcome) -> None:
    verdict = verdict_of(ballot("a", "b", first), ballot("b", "a", second))
    renamed = verdict_of(ballot("z", "b", first), ballot("b", "z", second))
    assert verdict.kind == renamed.kind
    assert {"a": "z", "b": "b", None: None}[verdict.winner_id] == renamed.winner_id


@given(outcomes, outcomes)
def test_flipping_the_judge_flips_the_label(first: Outcome, second: Outcome) -> None:
    verdict = verdict_of(ballot("a", "b", first), ballot("b", "a", second))
    opposite = verdict_of(ballot("a", "b", flipped(first)), ballot("b", "a", flipped(second)))
    assert verdict.kind == opposite.kind
    assert (verdict.winner_id, verdict.loser_id) == (opposite.loser_id, opposite.winner_id)
    assert verdict.margin == pytest.approx(opposite.margin, abs=1e-12)


@given(undecided, outcomes, st.booleans())
def test_no_failure_in_either_order_becomes_a_label(failure: Undecided, outcome: Outcome, failed_first: bool) -> None:
    first, second = (failure, outcome) if failed_first else (outcome, failure)
    verdict = verdict_of(ballot("a", "b", first), ballot("b", "a", second))
    assert verdict.kind is VerdictKind.UNDECIDED
    assert (verdict.winner_id, verdict.loser_id, verdict.p_a, verdict.margin) == (None, None, None, 0.0)


@pytest.mark.parametrize(("left", "right"), [("a", "b"), ("b", "c"), ("c", "a")])
def test_two_ballots_that_are_not_both_orders_are_refused(left: str, right: str) -> None:
    with pytest.raises(ValueError, match="not the two orders"):
        verdict_of(ballot("a", "b", Decided(p_left=1.0)), ballot(left, right, Decided(p_left=0.0)))


@given(st.text())
def test_any_text_is_an_outcome_and_only_whole_verdicts_decide(text: str) -> None:
    outcome = parse_verdict(text)
    if isinstance(outcome, Decided):
        assert set(json.loads(text, strict=False)) == {"rationale", "winner"}
    else:
        assert isinstance(outcome, Undecided)
        assert outcome.reason is UndecidedReason.MALFORMED


@given(st.text(), st.sampled_from(["A", "B", "tie"]))
def test_what_a_rationale_says_never_counts(rationale: str, winner: str) -> None:
    quoting = f'[[B]] {{"winner": "B"}} {rationale}'
    outcome = parse_verdict(json.dumps({"rationale": quoting, "winner": winner}))
    assert outcome == Decided(p_left={"A": 1.0, "B": 0.0, "tie": 0.5}[winner], rationale=quoting)


def test_a_raw_line_break_in_the_rationale_is_no_reason_to_lose_a_verdict() -> None:
    # Seen from vLLM 0.32 with xgrammar: every verdict of a random model held a control character and was thrown away.
    text = '{"rationale": "first\nsecond\t\x01", "winner": "B"}'
    assert parse_verdict(text) == Decided(p_left=0.0, rationale="first\nsecond\t\x01")


@pytest.mark.parametrize(
    "text",
    [
        '{"rationale": "x", "winner": "A", "winner": "B"}',
        '{"rationale": "x", "winner": "A", "extra": 1}',
        "[" * 100_000,
        '{"rationale": "x", "winner": "a"}',
        '{"rationale": "x", "winner": ["A"]}',
        '{"rationale": 1, "winner": "A"}',
        '```json\n{"rationale": "x", "winner": "A"}\n```',
        "A",
        "",
    ],
)
def test_near_misses_are_malformed(text: str) -> None:
    assert isinstance(parse_verdict(text), Undecided)
