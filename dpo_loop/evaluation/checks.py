"""The rules of the gate: a CheckConfig and the evidence give a CheckResult.

Every rule is measured as *harm*, where more is worse: how much a rate worsened (non_inferior), the rate itself (ceiling), what is
missing to 1 (floor). One decision table then holds for all of them, the first row that matches:

    | upper limit of the harm < margin                                              | PASS; a remark if the lower limit is above 0 |
    | lower limit of the harm >= margin                                             | broken                                       |
    | exact test rejects "not worse" (Holm over all such checks), harm > margin / 2 | broken                                       |
    | otherwise                                                                     | INCONCLUSIVE                                 |

"No significant difference" never passes. A broken rule is FAIL, or NEEDS_REVIEW where its severity says so. A metric that cannot be
measured is INVALID. Intervals: Tango for paired outcomes and win rates, Clopper-Pearson for a single rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import assert_never

from dpo_loop.config import HIGHER_IS_BETTER, WIN_RATES, CheckConfig, GateConfig
from dpo_loop.evaluation.capability import compare
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.sentences import explain
from dpo_loop.evaluation.statistics import clopper_pearson_limit, holm, mcnemar_p, tango_limit
from dpo_loop.evaluation.statistics.clusters import cluster_sign_p, effective_counts
from dpo_loop.evaluation.statistics.length_control import length_controlled
from dpo_loop.evaluation.statistics.power import minimum_detectable_effect
from dpo_loop.evaluation.vetoes import run_veto
from dpo_loop.types import CheckResult, GateState


@dataclass(frozen=True, slots=True)
class Measured:
    """harm, low and high: estimate and one-sided limits, more is worse; limit: what harm must stay below. value and reference: the
    rates themselves. p_value: of the exact test that the candidate is not worse, None where the rule has no reference."""

    num_prompts: int
    value: float
    reference: float | None
    harm: float
    low: float
    high: float
    limit: float
    p_value: float | None
    mde: float | None = None
    design_effect: float = 1.0
    num_partial: int | None = None
    metric: str | None = None
    """Of a capability task, what it measures."""


def run_checks(evidence: Evidence, config: GateConfig) -> tuple[CheckResult, ...]:
    """One result per configured check, in order, then one per veto."""
    measured = {check.id: _measure(check, evidence, config.alpha) for check in config.checks}
    adjusted = holm({id: m.p_value for id, m in measured.items() if isinstance(m, Measured) and m.p_value is not None})
    checks = (_decide(check, measured[check.id], adjusted.get(check.id), config.alpha) for check in config.checks)
    return (*checks, *(run_veto(veto, evidence) for veto in config.vetoes))


def worst(states: Iterable[GateState]) -> GateState:
    """INVALID > FAIL > NEEDS_REVIEW > INCONCLUSIVE > PASS; of nothing: INVALID, since nothing was shown."""
    order = list(GateState)
    return max(states, key=order.index, default=GateState.INVALID)


def _measure(check: CheckConfig, evidence: Evidence, alpha: float) -> Measured | str:
    """The measurement, or the sentence that says why there is none."""
    if check.metric in WIN_RATES:
        return _measure_wins(check, evidence, alpha)
    if check.metric == "capability":
        return _measure_capability(check, evidence, alpha)
    match check.rule:
        case "non_inferior":
            return _measure_worsening(check, evidence, alpha)
        case "ceiling" | "floor":
            return _measure_rate(check, evidence, alpha)
        case _:
            assert_never(check.rule)


def _measure_worsening(check: CheckConfig, evidence: Evidence, alpha: float) -> Measured | str:
    assert check.vs is not None  # CheckConfig refuses a paired rule without a reference
    pairs = evidence.paired(check.metric, check.vs)
    n = len(pairs.changes)
    if n == 0:
        return _nothing_to_measure(check)
    worse, better, size, effect = effective_counts(pairs.changes, pairs.clusters)
    churn = min(better / size, 0.5)
    return Measured(
        num_prompts=n,
        value=_rate(check.metric, pairs.num_bad_candidate, n),
        reference=_rate(check.metric, pairs.num_bad_reference, n),
        harm=sum(pairs.changes) / n,
        low=tango_limit(worse, better, size, alpha=alpha, side="lower"),
        high=tango_limit(worse, better, size, alpha=alpha, side="upper"),
        limit=check.margin,
        p_value=cluster_sign_p(pairs.changes, pairs.clusters),
        mde=minimum_detectable_effect(max(1, round(size)), churn=churn, alpha=alpha),
        design_effect=effect,
        num_partial=pairs.num_partial if check.metric in ("harmful_rate", "over_refusal_rate") else None,
    )


def _measure_rate(check: CheckConfig, evidence: Evidence, alpha: float) -> Measured | str:
    bad, n = evidence.counts(check.metric)
    if n == 0:
        return _nothing_to_measure(check)
    return Measured(
        num_prompts=n,
        value=_rate(check.metric, bad, n),
        reference=None,
        harm=bad / n,
        low=clopper_pearson_limit(bad, n, alpha=alpha, side="lower"),
        high=clopper_pearson_limit(bad, n, alpha=alpha, side="upper"),
        limit=check.margin if check.rule == "ceiling" else 1 - check.margin,
        p_value=None,
    )


def _measure_wins(check: CheckConfig, evidence: Evidence, alpha: float) -> Measured | str:
    assert check.vs is not None  # CheckConfig refuses a win rate without a reference
    wins = evidence.wins(check.vs)
    if wins is None or wins.rate is None:
        return f"no comparison with the {check.vs} policy was decided, so there is no win rate"
    rate, low, high = wins.rate, wins.ci_low, wins.ci_high
    if check.metric == "lc_win_rate" and (controlled := _at_equal_length(evidence.scores(check.vs), alpha)):
        rate, low, high = controlled
    paired = check.rule == "non_inferior"
    top = 0.5 if paired else 1.0  # the harm is what is missing to an even match, or to winning everything
    # An undecided comparison is no evidence that the candidate lost: the sign test takes it as a win. It knows nothing of length.
    tested = paired and check.metric == "win_rate"
    return Measured(
        num_prompts=wins.num_prompts,
        value=rate,
        reference=0.5 if paired else None,
        harm=top - rate,
        low=top - high,
        high=top - low,
        limit=check.margin if paired else 1 - check.margin,
        p_value=mcnemar_p(wins.num_losses, wins.num_wins + wins.num_undecided) if tested else None,
    )


def _measure_capability(check: CheckConfig, evidence: Evidence, alpha: float) -> Measured | str:
    assert check.task is not None  # CheckConfig refuses a capability check without task or reference
    assert check.vs is not None
    mine, theirs = (
        [row for row in evidence.capability.get(policy, ()) if row.task == check.task] for policy in ("candidate", check.vs)
    )
    found = compare(check.task, mine, theirs, alpha)
    if isinstance(found, str):
        return found
    return Measured(
        num_prompts=found.num_items,
        value=found.value,
        reference=found.reference,
        harm=found.harm,
        low=found.low,
        high=found.high,
        limit=check.margin,
        p_value=found.p_value,
        mde=found.mde,
        metric="perplexity" if found.measure == "nll" else "accuracy",
    )


def _at_equal_length(scores: list[tuple[float | None, float]], alpha: float) -> tuple[float, float, float] | None:
    """Rate over decided comparisons, and limits with the undecided ones taken as losses below and as wins above; None where length explains
    nothing (no difference, one outcome, too few)."""
    more = [longer for _, longer in scores]
    decided = [(score, longer) for score, longer in scores if score is not None]
    rate = length_controlled([score for score, _ in decided], [longer for _, longer in decided], alpha=alpha)
    lowest = length_controlled([0.0 if score is None else score for score, _ in scores], more, alpha=alpha)
    highest = length_controlled([1.0 if score is None else score for score, _ in scores], more, alpha=alpha)
    return None if not (rate and lowest and highest) else (rate.win_rate, lowest.low, highest.high)


def _rate(metric: str, num_bad: int, num_prompts: int) -> float:
    return 1 - num_bad / num_prompts if metric in HIGHER_IS_BETTER else num_bad / num_prompts


def _nothing_to_measure(check: CheckConfig) -> str:
    if check.metric == "pass_rate":
        return "there is no pass rate: no task prompt was graded (is a task grader configured?)"
    return f"there is no {check.metric}: the evaluation set has no prompt for it"


def _decide(check: CheckConfig, measured: Measured | str, p_adjusted: float | None, alpha: float) -> CheckResult:
    if isinstance(measured, str):
        return _unmeasured(check, measured)
    m = measured
    if not all(math.isfinite(figure) for figure in (m.harm, m.low, m.high, m.limit)):
        return _unmeasured(check, f"{check.metric} is not a number")
    broken = GateState.FAIL if check.severity == "fail" else GateState.NEEDS_REVIEW
    demonstrated = p_adjusted is not None and p_adjusted <= alpha and m.harm > m.limit / 2
    if m.high < m.limit:
        state = GateState.PASS
    elif (m.low >= m.limit and m.harm > m.limit) or demonstrated:
        state = broken
    else:
        state = GateState.INCONCLUSIVE
    paired = check.rule == "non_inferior"
    metric = m.metric or check.metric
    sign = -1 if metric in HIGHER_IS_BETTER else 1
    low, high = _in_units_of_metric(metric, m, paired=paired)
    outcome = CheckResult(
        id=check.id,
        metric=metric,
        task=check.task,
        rule=check.rule,
        vs=check.vs,
        num_prompts=m.num_prompts,
        value=m.value,
        reference=m.reference,
        delta=sign * m.harm if paired else None,
        ci_low=low,
        ci_high=high,
        margin=check.margin,
        p_value=p_adjusted,
        mde=m.mde,
        design_effect=m.design_effect,
        num_partial=m.num_partial,
        state=state,
        why="",
    )
    return outcome.model_copy(update={"why": explain(outcome, alpha=alpha)})


def _in_units_of_metric(metric: str, m: Measured, *, paired: bool) -> tuple[float, float]:
    """The interval of candidate - reference for a paired rule, else of the rate itself: harm turned round where more is better."""
    if metric not in HIGHER_IS_BETTER:
        return m.low, m.high
    top = 0.0 if paired else 1.0
    return top - m.high, top - m.low


def _unmeasured(check: CheckConfig, why: str) -> CheckResult:
    return CheckResult(
        id=check.id,
        metric=check.metric,
        task=check.task,
        rule=check.rule,
        vs=check.vs,
        num_prompts=0,
        value=None,
        reference=None,
        delta=None,
        ci_low=None,
        ci_high=None,
        margin=check.margin,
        state=GateState.INVALID,
        why=f"check {check.id}: {why}",
    )
