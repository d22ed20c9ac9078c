"""Best and worst of K by a randomised knockout: one call a match, so about 1.5 K calls instead of K (K - 1) for all pairs.

A match only selects; it never makes a label. The label comes from judging (best, worst) again in both orders. Simulation with a
biased judge (facts/judges.md §8.2): .992 of the labels right at K = 4, against .795 for a random pair judged once.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from judges.workers import all_of

Match = Callable[[str, str], Awaitable[float | None]]
"""match(first, second) → probability that the first shown is better, None when the judge was undecided."""


async def best_and_worst(ids: Sequence[str], rng: random.Random, match: Match, *, at_once: bool = False) -> tuple[str, str]:
    """Two different ids of at least two distinct ones. A tie or an undecided match keeps either, by `rng`.

    at_once: the matches of a round are played together, with the same end.

    The worst is sought among those who lost their first match: with an odd number one waits a round, and it may be the worst.
    """
    best, first_match_losers = await _knockout(ids, rng, match, keep_winner=True, at_once=at_once)
    worst, _ = await _knockout(first_match_losers, rng, match, keep_winner=False, at_once=at_once)
    return best, worst


async def _knockout(
    ids: Sequence[str], rng: random.Random, match: Match, *, keep_winner: bool, at_once: bool
) -> tuple[str, list[str]]:
    """The survivor, and those who were put out in the first match they played."""
    standing, newcomers, out_at_once = list(ids), set(ids), []
    rng.shuffle(standing)
    while len(standing) > 1:
        # The one left over plays first in the next round, so nobody waits twice in a row.
        survivors = standing[len(standing) // 2 * 2 :]
        pairs = list(zip(standing[::2], standing[1::2], strict=False))
        # Drawn whether or not they are needed: what is drawn later must not depend on the judge's answers.
        coins = [rng.random() < 0.5 for _ in pairs]
        played = await all_of([partial(match, first, second) for first, second in pairs], at_once=at_once)
        for (first, second), coin, p_first in zip(pairs, coins, played, strict=True):
            first_wins = coin if p_first is None or p_first == 0.5 else p_first > 0.5
            stays, goes = (first, second) if first_wins == keep_winner else (second, first)
            survivors.append(stays)
            if goes in newcomers:
                out_at_once.append(goes)
            newcomers -= {first, second}
        standing = survivors
    return standing[0], out_at_once
