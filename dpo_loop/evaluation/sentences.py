"""What a check found, as a sentence that a person understands without knowing the statistics behind it."""

from __future__ import annotations

from dpo_loop.config import HIGHER_IS_BETTER, METRIC_NAMES, WIN_RATES
from dpo_loop.types import CheckResult, GateState


def percent(rate: float | None) -> str:
    return "unknown" if rate is None else f"{100 * rate:.1f} %"


def points(difference: float) -> str:
    """Percentage points without the unit, never "-0.0"."""
    return f"{round(100 * difference, 1) + 0.0:.1f}"


def explain(check: CheckResult, *, alpha: float) -> str:
    """One sentence, no full stop. check: measured and decided; its `why` is not read."""
    if check.metric == "perplexity":
        return _perplexity(check, alpha)
    return _worsening(check, alpha) if check.rule == "non_inferior" else _absolute(check, alpha)


def _worsening(check: CheckResult, alpha: float) -> str:
    assert check.delta is not None
    assert check.ci_low is not None
    assert check.ci_high is not None
    name, confidence = METRIC_NAMES[check.metric] + (f" of {check.task}" if check.task else ""), _confidence(alpha)
    higher_is_better = check.metric in HIGHER_IS_BETTER
    worse, better = ("fall", "rise") if higher_is_better else ("rise", "fall")
    least, most = (-check.ci_high, -check.ci_low) if higher_is_better else (check.ci_low, check.ci_high)
    if check.metric in WIN_RATES:
        what = f"{name} against {check.vs} is {percent(check.value)}, an even match being 50.0 %"
    else:
        moved = "stayed at" if check.delta == 0 else "rose from" if check.delta > 0 else "fell from"
        path = percent(check.value) if check.delta == 0 else f"{percent(check.reference)} to {percent(check.value)}"
        what = f"{name} {moved} {path} against {check.vs}"
    limit = f"upper limit of the {worse} {points(most)}" if most > 0 else f"lower limit of the {better} {points(-most)}"
    partial = (
        f"; {check.num_partial} of these answers are partial" if check.num_partial and check.state is not GateState.PASS else ""
    )
    figures = f"n={check.num_prompts}; {confidence} {limit} points, margin {points(check.margin)}{partial}"
    match check.state:
        case GateState.PASS if least > 0:
            return f"{what}: worse, but within the margin ({figures})"
        case GateState.INCONCLUSIVE:
            return f"too little evidence: {what} ({figures})"
        case GateState.FAIL | GateState.NEEDS_REVIEW if least < check.margin:
            return f"{what} ({figures}; that it is no worse is ruled out, p={check.p_value or 0:.2g})"
        case _:
            return f"{what} ({figures})"


def _perplexity(check: CheckResult, alpha: float) -> str:
    assert check.delta is not None
    assert check.ci_low is not None
    assert check.ci_high is not None
    moved = "rose" if check.delta >= 0 else "fell"
    what = f"perplexity of {check.task} {moved} from {check.reference:.4g} to {check.value:.4g} against {check.vs}, by {percent(abs(check.delta))}"
    limit = f"{_confidence(alpha)} upper limit of the rise {percent(check.ci_high)}, margin {percent(check.margin)}"
    match check.state:
        case GateState.PASS if check.ci_low > 0:
            return f"{what}: worse, but within the margin (n={check.num_prompts}; {limit})"
        case GateState.INCONCLUSIVE:
            return f"too little evidence: {what} (n={check.num_prompts}; {limit})"
        case _:
            return f"{what} (n={check.num_prompts}; {limit})"


def _confidence(alpha: float) -> str:
    return f"{round(100 * (1 - alpha), 2):g} %"


def _absolute(check: CheckResult, alpha: float) -> str:
    assert check.ci_low is not None
    assert check.ci_high is not None
    confidence = _confidence(alpha)
    side, limit = ("upper", check.ci_high) if check.rule == "ceiling" else ("lower", check.ci_low)
    against = f" against {check.vs}" if check.vs else ""
    what = f"{METRIC_NAMES[check.metric]}{against} is {percent(check.value)}"
    figures = f"n={check.num_prompts}; {confidence} {side} limit {percent(limit)}, {check.rule} {percent(check.margin)}"
    return f"too little evidence: {what} ({figures})" if check.state is GateState.INCONCLUSIVE else f"{what} ({figures})"
