"""From evidence to a decision with its reasons."""

from __future__ import annotations

import hashlib
import math

from dpo_loop.artifacts import now
from dpo_loop.config import HIGHER_IS_BETTER, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.provenance import run_provenance
from dpo_loop.evaluation.rates import rates_of
from dpo_loop.evaluation.validity import ValidityResult, run_validity
from dpo_loop.types import CheckResult, GateReport, GateState, Waiver, canonical_json

WAIVABLE = (GateState.FAIL, GateState.NEEDS_REVIEW, GateState.INCONCLUSIVE)


def judge_candidate(evidence: Evidence, config: GateConfig, context: Context) -> GateReport:
    """Decide on evidence that is in memory. Checks are only run where the evaluation is valid: figures of a broken one mislead."""
    from dpo_loop.evaluation.checks import run_checks, worst  # scipy takes half a second to import

    validity = (*run_provenance(evidence, config, context), *run_validity(evidence, config, context))
    valid = all(result.state is not GateState.INVALID for result in validity)
    checks = tuple(_waived(check, context.waivers) for check in run_checks(evidence, config)) if valid else ()
    state = worst([*(result.state for result in validity), *(counted(check) for check in checks)])
    nothing_held = bool(checks) and all(check.waived_by for check in checks)
    if (state is GateState.INCONCLUSIVE and context.topped_up) or (state is GateState.PASS and nothing_held):
        state = GateState.NEEDS_REVIEW
    conditions = context.conditions[0].get("candidate") if context.conditions else None
    return GateReport(
        run_id=context.run_id,
        round=context.round,
        state=state,
        reasons=_reasons(state, validity, checks, context),
        candidate=context.candidate,
        previous=context.previous,
        anchor=context.anchor,
        validity=tuple(result.model_dump(mode="json") for result in validity),
        checks=checks,
        rates={**rates_of(evidence.rows, evidence.prompts.values())},
        created_at=now(),
        previous_report_sha256=context.previous_report_sha256,
        config_sha256=hashlib.sha256(canonical_json(config.model_dump(mode="json")).encode()).hexdigest(),
        anchor_round=context.anchor_round,
        prompt_sets=context.prompt_sets,
        conditions={}
        if conditions is None
        else conditions.model_dump(mode="json", exclude={"policy_key", "has_adapter", "canary"}),
        judge_canary=context.judge_canary,
        churn=dict(context.churn or {}),
        topped_up=context.topped_up,
    )


def counted(check: CheckResult) -> GateState:
    """The state of a check as it counts. A waiver lets what is undecided pass, and makes a failure, or anything against the anchor, a person's decision."""
    if check.waived_by is None:
        return check.state
    return GateState.NEEDS_REVIEW if check.state is GateState.FAIL or check.vs == "anchor" else GateState.PASS


def harm_of(check: CheckResult) -> float:
    """How bad a measured check is, more is worse: how much a rate worsened, or the rate itself."""
    amount = check.delta if check.delta is not None else check.value
    if amount is None or not math.isfinite(amount):
        return math.inf
    return -amount if check.metric in HIGHER_IS_BETTER else amount


def _waived(check: CheckResult, waivers: tuple[Waiver, ...]) -> CheckResult:
    """A waiver covers nothing worse than what it was given for, neither in state nor in amount."""
    order = list(GateState)
    for waiver in waivers:
        covers = order.index(check.state) <= order.index(GateState(waiver.state)) and harm_of(check) <= waiver.harm + 1e-12
        if waiver.check_id == check.id and check.state in WAIVABLE and covers:
            return check.model_copy(update={"waived_by": f"{waiver.reviewer}, up to round {waiver.expires_round}: {waiver.reason}"})
    return check


def _reasons(
    state: GateState, validity: tuple[ValidityResult, ...], checks: tuple[CheckResult, ...], context: Context
) -> tuple[str, ...]:
    """Sentences, the worst first. Of a PASS: what was shown, then every remark about a change for the worse within its margin. A waiver is always told."""
    waived = tuple(f"{check.why} (waived by {check.waived_by})" for check in checks if check.waived_by)
    if state is GateState.PASS:
        references = [name for name in ("previous", "anchor") if any(check.vs == name for check in checks)]
        against = f" against {' and '.join(references)}" if references else ""
        held = len(checks) - len(waived)
        shown = (
            f"every check holds: {held} of {len(checks)}{against}"
            if not waived
            else f"{held} of {len(checks)} checks hold{against}, {len(waived)} waived"
        )
        return (shown, *waived, *(check.why for check in checks if "within the margin" in check.why))
    order = list(GateState)
    found = [
        *((result.state, result.why) for result in validity),
        *((check.state, check.why) for check in checks if not check.waived_by),
    ]
    told = tuple(why for its, why in sorted(found, key=lambda item: -order.index(item[0])) if its is not GateState.PASS)
    still = (
        ("the reserve of prompts was asked too, and there is still too little evidence",)
        if context.topped_up and state is GateState.NEEDS_REVIEW and told
        else ()
    )
    return (*told, *waived, *still)
