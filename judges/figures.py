"""What a round tells about its judge, live: from the confirming ballots, and without knowing any right answer.

A knockout's matches are shown in one order only and would say nothing; they are left out.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from statistics import fmean
from typing import Any

from dpo_loop.types import Ballot, Decided, PromptJudgement, Tally, Verdict, VerdictKind
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


class Figures:
    """Adds up what is judged, and keeps none of it. lengths: characters of each answer, by id."""

    def __init__(self, lengths: Mapping[str, int] | None = None) -> None:
        self._lengths = lengths or {}
        self._kinds: Counter[str] = Counter()
        self._first: Counter[bool] = Counter()
        self._longer: Counter[bool] = Counter()
        self._more, self._p_a = array("d"), array("d")
        self._words: dict[tuple[str, str], Counter[tuple[str, str]]] = {}

    def add(self, judged: Judged) -> None:
        self._kinds[outcome_of(judged)] += 1
        for ballot in judged.final:
            if isinstance(ballot.outcome, Decided) and ballot.outcome.p_left != 0.5:
                self._first[ballot.outcome.p_left > 0.5] += 1
        verdict = judged.judgement.verdict
        if verdict is not None and verdict.p_a is not None and {verdict.a_id, verdict.b_id} <= self._lengths.keys():
            more = self._lengths[verdict.a_id] - self._lengths[verdict.b_id]
            self._more.append(more)
            self._p_a.append(verdict.p_a)
            if more and verdict.winner_id:
                self._longer[(more > 0) == (verdict.winner_id == verdict.a_id)] += 1
        self._add_words(judged)

    def _add_words(self, judged: Judged) -> None:
        said: dict[str, Verdict] = {}
        for ballot, swapped in zip(judged.final[::2], judged.final[1::2], strict=True):
            said[_unlike(ballot.judge, said)] = verdict_of(ballot, swapped)
        names = {judged.judgement.best_id: "best", judged.judgement.worst_id: "worst"}
        known = {judge: names.get(verdict.winner_id, "neither") for judge, verdict in said.items() if verdict.p_a is not None}
        for one, other in combinations(sorted(known), 2):
            self._words.setdefault((one, other), Counter())[known[one], known[other]] += 1

    def tally(self) -> Tally:
        parts = dict.fromkeys([*VerdictKind, NOTHING_TO_COMPARE], 0) | self._kinds
        return Tally(of="prompts", total=self._kinds.total(), parts={str(name): count for name, count in parts.items()})

    def metrics(self) -> dict[str, Any]:
        """yield: winners per prompt. consistency: share of pairs, decided in both orders, whose orders do not contradict each other.

        first_position_win_rate: of decided ballots that name a winner, how many name the answer shown first; 0.5 is unbiased.
        tie_rate: ties among pairs decided in both orders. longer_win_rate: of winners with another length than the loser, the
        longer ones. length_slope: of p_a on tanh(difference in length / its spread); 0 is unbiased. agreement: between judges.
        """
        decided = sum(self._kinds[kind] for kind in VerdictKind if kind is not VerdictKind.UNDECIDED)
        return {
            "yield": rate(self._kinds[VerdictKind.WINNER], self._kinds.total()),
            "consistency": rate(decided - self._kinds[VerdictKind.INCONSISTENT], decided),
            "first_position_win_rate": rate(self._first[True], self._first.total()),
            "tie_rate": rate(self._kinds[VerdictKind.TIE], decided),
            "longer_win_rate": rate(self._longer[True], self._longer.total()),
            "length_slope": _slope(self._more, self._p_a),
            **({"agreement": agreement(self._words)} if self._words else {}),
        }


def _unlike(judge: str, others: Collection[str]) -> str:
    """Two members of a panel may be the same model at two places."""
    return next(name for n in count(1) if (name := judge if n == 1 else f"{judge} ({n})") not in others)


def _slope(more: Sequence[float], p_a: Sequence[float]) -> float | None:
    """None where no two lengths differ. Both presentations of a pair are one point each, so the line goes through (0, 0.5)."""
    spread = math.sqrt(fmean(d * d for d in more)) if more else 0.0
    if spread == 0:
        return None
    x = [math.tanh(d / spread) for d in more]
    return sum(xi * (p - 0.5) for xi, p in zip(x, p_a, strict=True)) / sum(xi * xi for xi in x)


def agreement(words: Mapping[tuple[str, str], Counter[tuple[str, str]]]) -> dict[str, dict[str, float | int | None]]:
    """Per pair of judges: comparisons that both decided, share with the same word (best, worst, neither), and Cohen's kappa of it."""
    return {
        f"{one} and {other}": {
            "num": said.total(),
            "agree": rate(sum(num for (a, b), num in said.items() if a == b), said.total()),
            "kappa": kappa(said),
        }
        for (one, other), said in sorted(words.items())
    }


def kappa(said: Counter[tuple[str, str]]) -> float | None:
    """Cohen, 1960: (agreement - chance) / (1 - chance). None where chance alone would agree always."""
    total = said.total()
    if not total:
        return None
    one: Counter[str] = Counter()
    other: Counter[str] = Counter()
    for (a, b), num in said.items():
        one[a] += num
        other[b] += num
    chance = sum(one[word] * other[word] for word in one) / total**2
    seen = sum(num for (a, b), num in said.items() if a == b) / total
    return None if chance == 1 else (seen - chance) / (1 - chance)


def totals(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the figures of several judges, what adds up. cost_usd None: that of one is not known."""
    costs = [one["cost_usd"] for one in each]
    undecided = sum((Counter(one["undecided_calls"]) for one in each), Counter[str]())
    names = ("calls_asked", "calls_from_ledger", "input_tokens", "output_tokens")
    return {
        **{name: sum(one[name] for one in each) for name in names},
        "undecided_calls": dict(sorted(undecided.items())),
        "cost_usd": None if None in costs else sum(costs),
    }


def rate(num: int, of: int) -> float | None:
    return None if of == 0 else num / of


def unique(ballots: Iterable[Ballot]) -> list[Ballot]:
    """Each call once, in the order of first use: a final pair may have met while it was selected."""
    return list({(ballot.key, ballot.left_id, ballot.right_id): ballot for ballot in ballots}.values())


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
