"""Two ballots, one in each order, give a verdict. Pure, so a verdict can always be recomputed from what is stored."""

from __future__ import annotations

from dpo_loop.types import Ballot, Decided, Verdict, VerdictKind


def verdict_of(one: Ballot, other: Ballot) -> Verdict:
    """The verdict of the same two completions shown in both orders; the order of the arguments does not matter.

    p_a = (p of a shown first + p of a shown second) / 2. Same winner twice: winner. Tie twice: tie. A tie and a winner: weak. Opposite
    winners: inconsistent. Anything undecided: undecided. Raises ValueError if the ballots are not the two orders of one pair.
    """
    if one.right_id is None or other.right_id is None:
        raise ValueError(f"ballot {one.key[:12]} or {other.key[:12]} graded one answer alone, which compares nothing")
    if one.prompt_id != other.prompt_id or (one.left_id, one.right_id) != (other.right_id, other.left_id):
        raise ValueError(
            f"ballots {one.key[:12]} and {other.key[:12]} are not the two orders of one pair: {one.prompt_id} shows {one.left_id}, "
            f"{one.right_id}; {other.prompt_id} shows {other.left_id}, {other.right_id}"
        )
    a_id, b_id = sorted((one.left_id, one.right_id))
    if a_id == b_id:
        raise ValueError(f"a completion cannot be compared with itself: {a_id}")
    a_first, b_first = (one, other) if one.left_id == a_id else (other, one)
    keys = (a_first.key, b_first.key)
    if not isinstance(a_first.outcome, Decided) or not isinstance(b_first.outcome, Decided):
        return Verdict(
            prompt_id=one.prompt_id,
            a_id=a_id,
            b_id=b_id,
            kind=VerdictKind.UNDECIDED,
            p_a=None,
            winner_id=None,
            margin=0.0,
            ballot_keys=keys,
        )
    p_ab, p_ba = a_first.outcome.p_left, b_first.outcome.p_left
    p_a = (p_ab + (1 - p_ba)) / 2
    kind = _kind(_sign(p_ab - 0.5), _sign(0.5 - p_ba))
    winner_id = None if kind is not VerdictKind.WINNER else a_id if p_ab > 0.5 else b_id
    margin = abs(p_a - 0.5) * 2
    return Verdict(
        prompt_id=one.prompt_id, a_id=a_id, b_id=b_id, kind=kind, p_a=p_a, winner_id=winner_id, margin=margin, ballot_keys=keys
    )


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def _kind(says_first: int, says_second: int) -> VerdictKind:
    """Each argument is +1 for a, -1 for b, 0 for a tie."""
    if says_first != 0 and says_first == says_second:
        return VerdictKind.WINNER
    if says_first == 0 and says_second == 0:
        return VerdictKind.TIE
    if says_first == 0 or says_second == 0:
        return VerdictKind.WEAK
    return VerdictKind.INCONSISTENT
