"""Strengths of all policies of a run on one scale, from every comparison of every round, ties included.

Davidson (1970), "On extending the Bradley-Terry model to accommodate ties", JASA 65:317-328: of i against j, with strengths s and a tie
parameter nu, P(i wins) : P(j wins) : P(tie) = e^si : e^sj : nu e^((si + sj) / 2). The anchor's strength is 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
MOST_STEPS = 100
PRIOR = 0.5
"""Wins that each policy is given in both directions against the anchor: keeps a policy that never lost at a finite strength."""


class Game(NamedTuple):
    """One comparison. score: of `one` against `other`, 1, 0.5 or 0. prompt: resampled together."""

    prompt: str
    one: Hashable
    other: Hashable
    score: float


class Strength(NamedTuple):
    """Log-odds against the anchor, and one-sided limits."""

    value: float
    low: float
    high: float


def strengths(
    games: Sequence[Game], anchor: Hashable, *, alpha: float, seed: int = 0, num_resamples: int = 500
) -> dict[Hashable, Strength]:
    """Of every policy that played, the anchor at 0; limits by resampling prompts. Raises ValueError for a score that is none."""
    if odd := next((game for game in games if game.score not in (0.0, 0.5, 1.0)), None):
        raise ValueError(f"a score is 1, 0.5 or 0, not {odd.score} ({odd.one} against {odd.other})")
    names = [anchor, *sorted({name for game in games for name in (game.one, game.other)} - {anchor}, key=str)]
    index = {name: at for at, name in enumerate(names)}
    prompts = {prompt: at for at, prompt in enumerate(dict.fromkeys(game.prompt for game in games))}
    num = len(names)
    if num == 1:
        return {anchor: Strength(0.0, 0.0, 0.0)}
    # Per prompt, wins of i over j and ties of i with j.
    tables_P2MM = np.zeros((len(prompts), 2, num, num))
    for game in games:
        one, other = index[game.one], index[game.other]
        if game.score == 0.5:
            tables_P2MM[prompts[game.prompt], 1, min(one, other), max(one, other)] += 1
        else:
            winner, loser = (one, other) if game.score == 1.0 else (other, one)
            tables_P2MM[prompts[game.prompt], 0, winner, loser] += 1
    found = _fit(tables_P2MM.sum(0))
    rng = np.random.default_rng(seed)
    weights_RP = rng.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), size=num_resamples)
    drawn_RM = np.stack([_fit(np.tensordot(weights, tables_P2MM, axes=1)) for weights in weights_RP])
    low_M, high_M = np.quantile(drawn_RM, [alpha, 1 - alpha], axis=0)
    return {name: Strength(float(found[at]), float(low_M[at]), float(high_M[at])) for name, at in index.items()}


def _fit(table_2MM: Array) -> Array:
    """Strengths, the first fixed at 0, by Newton's method on strengths and log nu."""
    wins_MM, ties_MM = table_2MM[0].copy(), table_2MM[1]
    wins_MM[0, 1:] += PRIOR
    wins_MM[1:, 0] += PRIOR
    num = len(wins_MM)
    games_MM = np.triu(wins_MM + wins_MM.T + ties_MM + ties_MM.T, 1)
    pairs = np.argwhere(games_MM > 0)
    theta = np.zeros(num + 1)  # strengths, then log nu
    theta[-1] = np.log(max(ties_MM.sum(), 0.1) / max(wins_MM.sum(), 1.0))
    for _ in range(MOST_STEPS):
        gradient, hessian = np.zeros(num + 1), np.zeros((num + 1, num + 1))
        for i, j in pairs:
            n = games_MM[i, j]
            terms = np.array([theta[i], theta[j], theta[-1] + (theta[i] + theta[j]) / 2])
            p = np.exp(terms - terms.max())
            p /= p.sum()
            seen = np.array([wins_MM[i, j], wins_MM[j, i], ties_MM[i, j] + ties_MM[j, i]])
            design = np.zeros((3, num + 1))
            design[0, i] = design[1, j] = design[2, -1] = 1.0
            design[2, i] = design[2, j] = 0.5
            gradient += design.T @ (seen - n * p)
            hessian += n * design.T @ (np.diag(p) - np.outer(p, p)) @ design
        gradient[-1] += 0.05 - 0.05 * np.exp(theta[-1])  # a whisper of a prior, for runs without any tie
        hessian[-1, -1] += 0.05 * np.exp(theta[-1])
        step = np.zeros(num + 1)
        step[1:] = np.linalg.solve(hessian[1:, 1:] + 1e-9 * np.eye(num), gradient[1:])
        theta += np.clip(step, -1.0, 1.0)
        if np.abs(step).max() < 1e-9:
            break
    return np.asarray(theta[:num])
