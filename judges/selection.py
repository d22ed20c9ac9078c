"""Which two of K answers are compared for a label: knockout, round robin or grades. A selection never makes a label.

What a selecting call leaves undecided counts for nobody; every draw follows from `rng`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations

from dpo_loop.types import Ballot, Decided, Graded, Prompt
from judges.asker import Candidate
from judges.config import Knockout, Pointwise, RoundRobin, Selection
from judges.jury import Jury
from judges.knockout import best_and_worst


async def select(
    selection: Selection, jury: Jury, prompt: Prompt, answers: Mapping[str, Candidate], rng: random.Random
) -> tuple[str, str, list[Ballot]]:
    """Ids of best and worst of at least two different answers, and the ballots that say so."""
    ballots: list[Ballot] = []

    async def match(first: str, second: str) -> float | None:
        ballot = await jury.ask(prompt, answers[first], answers[second])
        ballots.append(ballot)
        return ballot.outcome.p_left if isinstance(ballot.outcome, Decided) else None

    ids = list(answers)
    match selection:
        case Knockout():
            best, worst = await best_and_worst(ids, rng, match)
        case RoundRobin():
            scores: dict[str, list[float]] = defaultdict(list)
            for first, second in combinations(ids, 2):
                for left, right in ((first, second), (second, first)):
                    if (p_left := await match(left, right)) is not None:
                        scores[left].append(p_left)
                        scores[right].append(1 - p_left)
            best, worst = extremes({name: sum(seen) / len(seen) for name, seen in scores.items()}, ids, rng)
        case Pointwise():
            ballots += [await jury.grade(prompt, answers[name]) for name in ids]
            grades = {b.left_id: b.outcome.quality for b in ballots if isinstance(b.outcome, Graded)}
            best, worst = extremes(grades, ids, rng)
    return best, worst, ballots


def extremes(scores: Mapping[str, float], ids: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Two different ids: of the highest and the lowest score, ties by lot; any two where fewer than two have a score."""
    drawn = rng.sample(list(ids), len(ids))
    scored = [name for name in drawn if name in scores] if len(scores) >= 2 else drawn
    best = max(scored, key=lambda name: scores.get(name, 0.0))
    worst = min((name for name in scored if name != best), key=lambda name: scores.get(name, 0.0))
    return best, worst
