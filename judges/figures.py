"""What a round tells about its judge, live: from the confirming ballots, and without knowing any right answer.

A knockout's matches are shown in one order only and would say nothing; they are left out.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from dpo_loop.types import Ballot, Decided, PromptJudgement, Tally, VerdictKind
from judges.verdict import verdict_of

NOTHING_TO_COMPARE = "nothing_to_compare"


@dataclass(frozen=True, slots=True)
class Judged:
    judgement: PromptJudgement
    final: tuple[Ballot, ...]
    """The ballots of the verdict, of each judge one in each order; empty where there was nothing to compare."""
    selecting: tuple[Ballot, ...]
    """The ballots that chose what is compared."""


def outcome_of(judged: Judged) -> str:
    verdict = judged.judgement.verdict
    return NOTHING_TO_COMPARE if verdict is None else verdict.kind.value


def tally(judged: Sequence[Judged]) -> Tally:
    parts = dict.fromkeys([*VerdictKind, NOTHING_TO_COMPARE], 0) | Counter(outcome_of(item) for item in judged)
    return Tally(of="prompts", total=len(judged), parts={str(name): count for name, count in parts.items()})


def figures(judged: Sequence[Judged], lengths: Mapping[str, int] | None = None) -> dict[str, Any]:
    """lengths: characters of each answer, by id.

    yield: winners per prompt. consistency: share of pairs, decided in both orders, whose orders do not contradict each other.
    first_position_win_rate: of decided ballots that name a winner, how many name the answer shown first; 0.5 is unbiased.
    tie_rate: ties among pairs decided in both orders. longer_win_rate: of winners with another length than the loser, the
    longer ones. length_slope: of p_a on tanh(difference in length / its deviation); 0 is unbiased. agreement: between judges.
    """
    kinds = Counter(outcome_of(item) for item in judged)
    decided = sum(kinds[kind] for kind in VerdictKind if kind is not VerdictKind.UNDECIDED)
    p_first = [b.outcome.p_left for item in judged for b in item.final if isinstance(b.outcome, Decided)]
    winners = [p for p in p_first if p != 0.5]
    return {
        "yield": rate(kinds[VerdictKind.WINNER], len(judged)),
        "consistency": rate(decided - kinds[VerdictKind.INCONSISTENT], decided),
        "first_position_win_rate": rate(sum(p > 0.5 for p in winners), len(winners)),
        "tie_rate": rate(kinds[VerdictKind.TIE], decided),
        **_of_length(judged, lengths or {}),
        **({"agreement": found} if (found := agreement(judged)) else {}),
    }


def _of_length(judged: Sequence[Judged], lengths: Mapping[str, int]) -> dict[str, float | None]:
    verdicts = [item.judgement.verdict for item in judged]
    known = [v for v in verdicts if v is not None and v.p_a is not None and {v.a_id, v.b_id} <= lengths.keys()]
    more = [lengths[verdict.a_id] - lengths[verdict.b_id] for verdict in known]
    wins = [(d > 0) == (v.winner_id == v.a_id) for d, v in zip(more, known, strict=True) if d and v.winner_id]
    return {
        "longer_win_rate": rate(sum(wins), len(wins)),
        "length_slope": _slope(more, [verdict.p_a or 0.0 for verdict in known]),
    }


def _slope(more: Sequence[int], p_a: Sequence[float]) -> float | None:
    """None where no two lengths differ. Both presentations of a pair are one point each, so the line goes through (0, 0.5)."""
    spread = math.sqrt(fmean(d * d for d in more)) if more else 0.0
    if spread == 0:
        return None
    x = [math.tanh(d / spread) for d in more]
    return sum(xi * (p - 0.5) for xi, p in zip(x, p_a, strict=True)) / sum(xi * xi for xi in x)


def agreement(judged: Sequence[Judged]) -> dict[str, dict[str, float | int | None]]:
    """Per pair of judges: comparisons that both decided, share with the same word (a, b, neither), and Cohen's kappa of it."""
    words: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for item in judged:
        said = {one.judge: verdict_of(one, other) for one, other in zip(item.final[::2], item.final[1::2], strict=True)}
        known = {judge: verdict.winner_id or "neither" for judge, verdict in said.items() if verdict.p_a is not None}
        ab = {item.judgement.best_id: "best", item.judgement.worst_id: "worst"}
        for one, other in combinations(sorted(known), 2):
            words.setdefault((one, other), []).append((ab.get(known[one], "neither"), ab.get(known[other], "neither")))
    return {
        f"{one} and {other}": {"num": len(said), "agree": rate(sum(a == b for a, b in said), len(said)), "kappa": kappa(said)}
        for (one, other), said in sorted(words.items())
    }


def kappa(said: Sequence[tuple[str, str]]) -> float | None:
    """Cohen, 1960: (agreement - chance) / (1 - chance). None where chance alone would agree always."""
    if not said:
        return None
    one, other = Counter(a for a, _ in said), Counter(b for _, b in said)
    chance = sum(one[word] * other[word] for word in one) / len(said) ** 2
    return None if chance == 1 else (sum(a == b for a, b in said) / len(said) - chance) / (1 - chance)


def rate(num: int, of: int) -> float | None:
    return None if of == 0 else num / of


def unique(ballots: Iterable[Ballot]) -> list[Ballot]:
    """Each call once, in the order of first use: a final pair may have met while it was selected."""
    return list({(ballot.key, ballot.left_id, ballot.right_id): ballot for ballot in ballots}.values())


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
