"""The gate: may the candidate generate the next round? Validity first, then the checks; the worst state wins and is explained."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dpo_loop.artifacts import Stage, now
from dpo_loop.config import GateConfig
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.junit import write_junit
from dpo_loop.evaluation.rates import rates_of
from dpo_loop.evaluation.validity import ValidityResult, run_validity
from dpo_loop.exchange import GATE_REPORT, JUNIT, read_comparisons, read_grades, read_prompts
from dpo_loop.files import write_json
from dpo_loop.progress import say
from dpo_loop.types import CheckResult, GateReport, GateState, PolicyRef, StageOutcome, Tally


def _gate(
    out: Path,
    *,
    prompts: Path,
    grades: Path,
    candidate: PolicyRef,
    previous: PolicyRef,
    anchor: PolicyRef,
    heuristic_safety: bool,
    config: GateConfig,
    run_id: str,
    round: int,
    previous_report_sha256: str | None = None,
) -> StageOutcome:
    evidence = Evidence(read_prompts(prompts), read_grades(grades), read_comparisons(grades), alpha=config.alpha)
    report = judge_candidate(
        evidence,
        config,
        candidate=candidate,
        previous=previous,
        anchor=anchor,
        heuristic_safety=heuristic_safety,
        run_id=run_id,
        round=round,
    )
    return _publish(out, report.model_copy(update={"previous_report_sha256": previous_report_sha256}))


def _gate_invalid(
    out: Path,
    *,
    reasons: tuple[str, ...],
    candidate: PolicyRef | None,
    previous: PolicyRef,
    anchor: PolicyRef,
    run_id: str,
    round: int,
    previous_report_sha256: str | None = None,
) -> StageOutcome:
    """An earlier stage could not finish: the round has no candidate that could be judged."""
    report = GateReport(
        run_id=run_id,
        round=round,
        state=GateState.INVALID,
        reasons=reasons or ("an earlier stage of the round could not finish",),
        candidate=candidate,
        previous=previous,
        anchor=anchor,
        validity=(),
        checks=(),
        rates={},
        created_at=now(),
        previous_report_sha256=previous_report_sha256,
    )
    return _publish(out, report)


GATE = Stage("gate", 3, _gate)
GATE_INVALID = Stage("gate", 3, _gate_invalid)


def judge_candidate(
    evidence: Evidence,
    config: GateConfig,
    *,
    candidate: PolicyRef,
    previous: PolicyRef,
    anchor: PolicyRef,
    heuristic_safety: bool,
    run_id: str,
    round: int,
) -> GateReport:
    """Decide on evidence that is in memory. Checks are only run where the evaluation is valid: figures of a broken one mislead."""
    from dpo_loop.evaluation.checks import run_checks, worst  # scipy takes half a second to import

    validity = run_validity(evidence, config, candidate=candidate, previous=previous, heuristic_safety=heuristic_safety)
    valid = all(result.state is not GateState.INVALID for result in validity)
    checks = run_checks(evidence, config) if valid else ()
    state = worst([*(result.state for result in validity), *(check.state for check in checks)])
    return GateReport(
        run_id=run_id,
        round=round,
        state=state,
        reasons=_reasons(state, validity, checks),
        candidate=candidate,
        previous=previous,
        anchor=anchor,
        validity=tuple(result.model_dump(mode="json") for result in validity),
        checks=checks,
        rates={**rates_of(evidence.rows, evidence.prompts.values())},
        created_at=now(),
    )


def _reasons(state: GateState, validity: tuple[ValidityResult, ...], checks: tuple[CheckResult, ...]) -> tuple[str, ...]:
    """Sentences, the worst first. Of a PASS: what was shown, then every remark about a change for the worse within its margin."""
    if state is GateState.PASS:
        references = [name for name in ("previous", "anchor") if any(check.vs == name for check in checks)]
        against = f" against {' and '.join(references)}" if references else ""
        shown = f"every check holds: {len(checks)} of {len(checks)}{against}"
        return (shown, *(check.why for check in checks if "within the margin" in check.why))
    order = list(GateState)
    found = [*((result.state, result.why) for result in validity), *((check.state, check.why) for check in checks)]
    return tuple(why for its, why in sorted(found, key=lambda item: -order.index(item[0])) if its is not GateState.PASS)


def _publish(out: Path, report: GateReport) -> StageOutcome:
    write_json(out / GATE_REPORT, report)
    write_junit(out / JUNIT, report)
    say(f"gate: {report.state.value}: {report.reasons[0]}")
    states = Counter(check.state.value for check in report.checks)
    return StageOutcome(
        tallies=(Tally(of="checks", total=len(report.checks), parts=dict(states)),),
        metrics={"state": report.state.value, "reasons": list(report.reasons)},
    )
