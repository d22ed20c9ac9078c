"""Which two of K answers are compared for a label: knockout, round robin or grades. A selection never makes a label.

What a selecting call leaves undecided counts for nobody; every draw follows from `rng`.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import combinations

from dpo_loop.types import Ballot, Decided, Graded, Prompt
from judges.asker import Candidate
from judges.config import Knockout, Pointwise, RoundRobin, Selection
from judges.jury import Jury
from judges.knockout import best_and_worst
from judges.workers import all_of


async def select(
    selection: Selection, jury: Jury, prompt: Prompt, answers: Mapping[str, Candidate], rng: random.Random
) -> tuple[str, str, list[Ballot]]:
    """Ids of best and worst of at least two different answers, and the ballots that say so."""
    ballots: list[Ballot | None] = []

    async def match(first: str, second: str) -> float | None:
        place = len(ballots)
        ballots.append(None)  # in the order of asking: who answers first is chance
        ballot = ballots[place] = await jury.ask(prompt, answers[first], answers[second])
        return ballot.outcome.p_left if isinstance(ballot.outcome, Decided) else None

    ids = list(answers)
    match selection:
        case Knockout():
            best, worst = await best_and_worst(ids, rng, match, at_once=jury.in_waves)
        case RoundRobin():
            scores: dict[str, list[float]] = defaultdict(list)
            shown = [both for one, other in combinations(ids, 2) for both in ((one, other), (other, one))]
            played = await all_of([partial(match, *pair) for pair in shown], at_once=jury.in_waves)
            for (left, right), p_left in zip(shown, played, strict=True):
                if p_left is not None:
                    scores[left].append(p_left)
                    scores[right].append(1 - p_left)
            best, worst = extremes({name: sum(seen) / len(seen) for name, seen in scores.items()}, ids, rng)
        case Pointwise():
            graded = await all_of([partial(jury.grade, prompt, answers[name]) for name in ids], at_once=jury.in_waves)
            ballots += graded
            grades = {b.left_id: b.outcome.quality for b in graded if isinstance(b.outcome, Graded)}
            best, worst = extremes(grades, ids, rng)
    return best, worst, [ballot for ballot in ballots if ballot is not None]


def extremes(scores: Mapping[str, float], ids: Sequence[str], rng: random.Random) -> tuple[str, str]:
    """Two different ids: of the highest and the lowest score, ties by lot; any two where fewer than two have a score."""
    drawn = rng.sample(list(ids), len(ids))
    scored = [name for name in drawn if name in scores] if len(scores) >= 2 else drawn
    best = max(scored, key=lambda name: scores.get(name, 0.0))
    worst = min((name for name in scored if name != best), key=lambda name: scores.get(name, 0.0))
    return best, worst
