"""Ballots in both orders give a verdict, of one judge or of a panel. Pure, so a verdict can always be recomputed from what is stored."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

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


def panel_verdict_of(votes: Sequence[tuple[Ballot, Ballot]], *, min_families: int) -> Verdict:
    """The verdict of several judges on the same two completions; votes: of each judge, its ballots in both orders.

    p_a is the mean over families of the mean over their judges that decided. A winner is named by more than half of the families
    that decided and by the mean; families that name opposite winners without such a majority are inconsistent. Fewer than
    min_families that decided: undecided.
    """
    verdicts = [verdict_of(one, other) for one, other in votes]
    if len({(verdict.prompt_id, verdict.a_id, verdict.b_id) for verdict in verdicts}) != 1:
        raise ValueError("the votes of a panel are not about the same pair")
    pair = {"prompt_id": verdicts[0].prompt_id, "a_id": verdicts[0].a_id, "b_id": verdicts[0].b_id}
    keys = tuple(key for verdict in verdicts for key in verdict.ballot_keys)
    families: dict[str, list[Verdict]] = defaultdict(list)
    for (ballot, _), verdict in zip(votes, verdicts, strict=True):
        if verdict.p_a is not None:
            families[ballot.family].append(verdict)
    if len(families) < min_families:
        return Verdict(**pair, kind=VerdictKind.UNDECIDED, p_a=None, winner_id=None, margin=0.0, ballot_keys=keys)
    p_a = fmean(fmean(verdict.p_a or 0.0 for verdict in members) for members in families.values())
    signs = [_family_sign(members) for members in families.values()]
    kinds = {verdict.kind for members in families.values() for verdict in members}
    majority = (signs.count(1) * 2 > len(signs)) - (signs.count(-1) * 2 > len(signs))
    if majority != 0 and majority == _sign(p_a - 0.5):
        kind = VerdictKind.WINNER
    elif kinds == {VerdictKind.TIE}:
        kind = VerdictKind.TIE
    elif VerdictKind.INCONSISTENT in kinds or {1, -1} <= set(signs):
        kind = VerdictKind.INCONSISTENT
    else:
        kind = VerdictKind.WEAK
    winner_id = None if kind is not VerdictKind.WINNER else pair["a_id"] if majority > 0 else pair["b_id"]
    return Verdict(**pair, kind=kind, p_a=p_a, winner_id=winner_id, margin=abs(p_a - 0.5) * 2, ballot_keys=keys)


def _family_sign(members: Sequence[Verdict]) -> int:
    """+1 where all judges of a family name a, -1 where all name b, else 0."""
    named = {verdict.winner_id for verdict in members}
    return {members[0].a_id: 1, members[0].b_id: -1}.get(named.pop() or "", 0) if len(named) == 1 else 0


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
