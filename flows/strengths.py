"""All policies of a run on one scale: Bradley-Terry strengths from every comparison of every round, the start policy at 0."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from dpo_loop.evaluation.rates import result_of
from dpo_loop.evaluation.statistics.bradley_terry import Game, Strength, strengths
from dpo_loop.exchange import read_comparisons
from dpo_loop.layout import RunDir
from dpo_loop.policies import read_blessing
from flows.summary import graded_parts
from flows.terms import terms_of

NUM_RESAMPLES = 200
_SCORES = {"win": 1.0, "tie": 0.5, "loss": 0.0}


def strengths_of(run: RunDir, *, alpha: float) -> dict[int, Strength]:
    """By round, log-odds of its candidate against the start policy; empty where nothing was compared."""
    games = list(_games(run))
    found = strengths(games, 0, alpha=alpha, num_resamples=NUM_RESAMPLES) if games else {}
    return {number: strength for number, strength in found.items() if isinstance(number, int) and number > 0}


def _games(run: RunDir) -> Iterator[Game]:
    """Undecided comparisons are none; those of a top-up are games like the others. Where the previous policy is the anchor, both comparisons are the same one."""
    for here in run.rounds():
        if here.number == 0 or not (parts := graded_parts(run, here.number)):
            continue
        parent = read_blessing(here.parent, run=run.path).round
        anchor = terms_of(run, here.number).anchor_round
        opponents = {"anchor": anchor} if parent == anchor else {"anchor": anchor, "previous": parent}
        for comparison in chain.from_iterable(read_comparisons(graded) for _, graded in parts):
            score = _SCORES.get(result_of(comparison))
            if score is not None and comparison.vs in opponents:
                yield Game(comparison.prompt_id, here.number, opponents[comparison.vs], score)


def lines_of(found: dict[int, Strength]) -> list[str]:
    if not found:
        return []
    told = ", ".join(f"round {n} {s.value:+.2f} [{s.low:+.2f}, {s.high:+.2f}]" for n, s in sorted(found.items()))
    return [f"strength over all rounds, log-odds of winning where one of the two wins, start policy 0: {told}"]
