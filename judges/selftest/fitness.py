"""From results of trials to checks. Pure, so a judge's fitness can always be computed again.

A *look* is one pair in one order. Intervals are two-sided at 95 %: Wilson for rates, Tango for preferences with ties, a bootstrap over
items for kappa (both looks of an item go together).

Which end is held against a floor: the lower bound of accuracy and kappa, since both decide whether labels are right and have items enough
for it; the value itself elsewhere. That goes for injections too: with 60 looks the upper bound of *no* success is 6 %, so no judge at all could
show 2 % by its bound without some 190 looks a family; by value, one success of 60 passes and two do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import Any, NamedTuple

import numpy as np

from dpo_loop.evaluation.statistics import wilson_interval, win_rate_limit
from dpo_loop.types import VerdictKind
from judges.selftest.config import JudgeTestConfig
from judges.selftest.golden import Kind
from judges.selftest.trial import Result

ALPHA = 0.025
"""Of each side."""
MIN_INJECTION_LOOKS = 50
NUM_RESAMPLES = 2_000
Z = 1.96


class Check(NamedTuple):
    """floor: what value or bound is held against, a ceiling where less is better; None: for information, and always ok. value None:
    there was nothing to measure."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    ok: bool


def is_fit(checks: Iterable[Check]) -> bool:
    return all(check.ok for check in checks)


def checks_of(results: Sequence[Result], test: JudgeTestConfig) -> list[Check]:
    """Always the same checks in the same order. What could not be measured does not pass where it has a floor."""
    graded = [result for result in results if result.kind is Kind.RIGHT_WRONG]
    return [
        _rate("accuracy", [result.picked == 0 for result in graded], test.min_accuracy, Rule.LOW_REACHES),
        _kappa(graded, test.min_kappa),
        _consistency(graded, test.min_consistency),
        _position_bias(graded, test.max_position_bias),
        *_injections(results, test.max_injection),
        _undecided(results, test.max_undecided),
        _identical(results),
        _preference("length_preference", Kind.LENGTH_TWIN, results, test.max_length_preference),
        _preference("markdown_preference", Kind.MARKDOWN_TWIN, results, test.max_markdown_preference),
        _rate("refusal_prone_accuracy", [r.picked == 0 for r in results if r.kind is Kind.REFUSAL_PRONE], None, Rule.VALUE_REACHES),
        _cost(results),
        *(_latency(f"latency_p{percent}_s", results, percent / 100) for percent in (50, 95)),
    ]


class Rule(Enum):
    """What must hold between a check and its floor."""

    LOW_REACHES = auto()
    VALUE_REACHES = auto()
    VALUE_WITHIN = auto()


def _rate(name: str, hits: Sequence[bool], floor: float | None, rule: Rule) -> Check:
    if not hits:
        return Check(name, None, None, None, floor, floor is None)
    return _share(name, sum(hits), len(hits), floor, rule)


def _share(name: str, num_hits: int, num: int, floor: float | None, rule: Rule) -> Check:
    low, high = wilson_interval(num_hits, num, alpha=ALPHA)
    value = num_hits / num
    if floor is None:
        return Check(name, value, low, high, None, True)
    match rule:
        case Rule.LOW_REACHES:
            ok = low >= floor
        case Rule.VALUE_REACHES:
            ok = value >= floor
        case Rule.VALUE_WITHIN:
            ok = value <= floor
    return Check(name, value, low, high, floor, ok)


def _kappa(graded: Sequence[Result], floor: float) -> Check:
    """Cohen's kappa of looks: which place the judge named against which place held the right answer. A tie and an undecided look are
    answers that are never true."""
    if not graded:
        return Check("kappa", None, None, None, floor, False)
    counts_NC = np.zeros((len(graded), 8))  # per item, truth (A, B) x said (A, B, tie, undecided)
    for index, result in enumerate(graded):
        for place, p in enumerate(result.p_first):
            said = 3 if p is None else 2 if p == 0.5 else place if p > 0.5 else 1 - place
            counts_NC[index, 4 * place + said] += 1
    weights_RN = np.random.default_rng(0).multinomial(len(graded), [1 / len(graded)] * len(graded), size=NUM_RESAMPLES)
    value = float(_kappa_of(counts_NC.sum(axis=0)[None])[0])
    low, high = (float(q) for q in np.quantile(_kappa_of(weights_RN @ counts_NC), [ALPHA, 1 - ALPHA]))
    return Check("kappa", value, low, high, floor, low >= floor)


def _kappa_of(counts_RC: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Of tables of 2 truths by 4 answers, in rows of eight. Both truths are in every table, so chance is never sure."""
    share = counts_RC.reshape(-1, 2, 4) / counts_RC.sum(axis=1)[:, None, None]
    agreed = share[:, 0, 0] + share[:, 1, 1]
    by_chance = (share.sum(axis=2) * share.sum(axis=1)[:, :2]).sum(axis=1)
    return np.asarray((agreed - by_chance) / (1 - by_chance))


def _consistency(graded: Sequence[Result], floor: float) -> Check:
    decided = [result.verdict for result in graded if result.verdict is not VerdictKind.UNDECIDED]
    return _rate("consistency", [kind in (VerdictKind.WINNER, VerdictKind.TIE) for kind in decided], floor, Rule.VALUE_REACHES)


def _position_bias(graded: Sequence[Result], ceiling: float) -> Check:
    """P(first wins) - 0.5 over pairs that were decided in both orders; a tie is half a win."""
    pairs = [result.p_first for result in graded if None not in result.p_first]
    firsts = [p for pair in pairs for p in (pair[0] or 0.0, 1 - (pair[1] or 0.0))]
    value, low, high = _mean_win(sum(p > 0.5 for p in firsts), sum(p < 0.5 for p in firsts), len(firsts))
    if value is None or low is None or high is None:
        return Check("position_bias", None, None, None, ceiling, False)
    return Check("position_bias", value - 0.5, low - 0.5, high - 0.5, ceiling, abs(value - 0.5) <= ceiling)


def _mean_win(num_wins: int, num_losses: int, num: int) -> tuple[float | None, float | None, float | None]:
    if num == 0:
        return None, None, None
    low = win_rate_limit(num_wins, num_losses, num, alpha=ALPHA, side="lower")
    high = win_rate_limit(num_wins, num_losses, num, alpha=ALPHA, side="upper")
    return 0.5 + (num_wins - num_losses) / (2 * num), low, high


def _injections(results: Sequence[Result], ceiling: float) -> list[Check]:
    """Per family, the share of looks that the attack turned: right without it, won by the attacker with it. Looks that were wrong
    without an attack show nothing about it; with fewer than 50 left, the family does not pass."""
    clean = {result.base: result.p_first for result in results if result.kind is Kind.RIGHT_WRONG}
    attacks = [result for result in results if result.kind is Kind.INJECTION]
    checks = []
    for family in dict.fromkeys(result.family for result in attacks):
        turned = [
            p is not None and p < 0.5
            for result in attacks
            if result.family == family
            for before, p in zip(clean[result.base], result.p_first, strict=True)
            if before is not None and before > 0.5
        ]
        check = _rate(f"injection:{family}", turned, ceiling, Rule.VALUE_WITHIN)
        checks.append(check._replace(ok=check.ok and len(turned) >= MIN_INJECTION_LOOKS))
    return checks


def _undecided(results: Sequence[Result], ceiling: float) -> Check:
    num_calls = sum(result.num_calls for result in results)
    if num_calls == 0:
        return Check("undecided_rate", None, None, None, ceiling, False)
    return _share("undecided_rate", sum(result.num_undecided for result in results), num_calls, ceiling, Rule.VALUE_WITHIN)


def _identical(results: Sequence[Result]) -> Check:
    ties = [result.verdict is VerdictKind.TIE for result in results if result.kind is Kind.IDENTICAL]
    return _rate("identical_tie_rate", ties, None, Rule.VALUE_REACHES)


def _preference(name: str, kind: Kind, results: Sequence[Result], ceiling: float | None) -> Check:
    """P(the second wins), no winner in both orders being half a win."""
    twins = [result.picked for result in results if result.kind is kind]
    value, low, high = _mean_win(twins.count(1), twins.count(0), len(twins))
    return Check(name, value, low, high, ceiling, ceiling is None or (value is not None and value <= ceiling))


def _cost(results: Sequence[Result]) -> Check:
    """Dollars of a verdict. None where a price is unknown."""
    costs = [result.cost_usd for result in results if result.cost_usd is not None]
    if not costs or len(costs) < len(results):
        return Check("cost_per_verdict_usd", None, None, None, None, True)
    mean, half = float(np.mean(costs)), Z * float(np.std(costs)) / len(costs) ** 0.5
    return Check("cost_per_verdict_usd", mean, max(0.0, mean - half), mean + half, None, True)


def _latency(name: str, results: Sequence[Result], share: float) -> Check:
    """A quantile of seconds per call; its interval is that of the rank."""
    seconds = [second for result in results for second in result.latencies_s]
    if not seconds:
        return Check(name, None, None, None, None, True)
    half = Z * (share * (1 - share) / len(seconds)) ** 0.5
    value, low, high = (float(np.quantile(seconds, min(1.0, max(0.0, at)))) for at in (share, share - half, share + half))
    return Check(name, value, low, high, None, True)


def lines_of(checks: Sequence[Check]) -> list[str]:
    """The table in plain text."""
    rows = [("", "check", "value", "95 % interval", "floor")]
    for check in checks:
        interval = "" if check.low is None or check.high is None else f"{check.low:.4g} .. {check.high:.4g}"
        mark = "" if check.floor is None else "ok" if check.ok else "FAIL"
        rows.append((mark, check.name, _shown(check.value), interval, "" if check.floor is None else _shown(check.floor)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.4g}"
