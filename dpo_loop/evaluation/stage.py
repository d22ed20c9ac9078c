"""The gate: may the candidate generate the next round? Validity first, then the checks; the worst state wins and is explained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

from dpo_loop.artifacts import Stage, now
from dpo_loop.config import GateConfig
from dpo_loop.contamination import Corpus, asked
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.decision import judge_candidate
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.junit import write_junit
from dpo_loop.evaluation.rates import churn_of
from dpo_loop.exchange import (
    GATE_REPORT,
    JUNIT,
    read_capability,
    read_comparisons,
    read_conditions,
    read_grades,
    read_judge_canary,
    read_prompt_sets,
    read_prompts,
)
from dpo_loop.files import write_json
from dpo_loop.progress import say
from dpo_loop.types import GateReport, GateState, PolicyName, PolicyRef, StageOutcome, Tally, Terms

ORDINARY = Terms()


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
    answers: Mapping[PolicyName, Path] | None = None,
    capability: Mapping[PolicyName, Path] | None = None,
    more: Mapping[str, Path] | None = None,
    first_grades: Path | None = None,
    again: Path | None = None,
    trained: tuple[Path, ...] = (),
    held_out: tuple[Path, ...] = (),
    terms: Terms = ORDINARY,
    looks: int = 1,
    previous_report_sha256: str | None = None,
) -> StageOutcome:
    """answers, capability: stages of each policy; what is left out is not looked at, as for rows that somebody else vouches for. more: `prompts` and `grades` of the top-up, empty where there was none. first_grades, again: of the
    anchor in round 0, and of its second evaluation. trained: the prompts of all rounds so far. held_out: all evaluation prompts of
    the run, the reserve too. looks: so many may decide, and share alpha."""
    config = config.model_copy(update={"alpha": config.alpha / looks})
    parts = [(prompts, grades), *([(more["prompts"], more["grades"])] if more else [])]
    evidence = Evidence(
        chain.from_iterable(read_prompts(asked) for asked, _ in parts),
        chain.from_iterable(read_grades(graded) for _, graded in parts),
        chain.from_iterable(read_comparisons(graded) for _, graded in parts),
        alpha=config.alpha,
        capability={policy: read_capability(made) for policy, made in (capability or {}).items()},
    )
    context = Context(
        candidate=candidate,
        previous=previous,
        anchor=anchor,
        run_id=run_id,
        round=round,
        heuristic_safety=heuristic_safety,
        anchor_round=terms.anchor_round,
        conditions=None if answers is None else {policy: read_conditions(made) for policy, made in answers.items()},
        judge_canary=read_judge_canary(grades),
        first_canary=None if first_grades is None else read_judge_canary(first_grades),
        contaminated=_contaminated(trained, held_out) if held_out else None,
        churn=churn_of(read_grades(first_grades), read_grades(again)) if first_grades and again else None,
        prompt_sets=read_prompt_sets(prompts),
        waivers=terms.waivers,
        topped_up=bool(more),
        previous_report_sha256=previous_report_sha256,
    )
    return _publish(out, judge_candidate(evidence, config, context))


def _contaminated(trained: tuple[Path, ...], held_out: tuple[Path, ...]) -> tuple[str, ...]:
    corpus = Corpus(asked(prompt) for made in held_out for prompt in read_prompts(made))
    return tuple(prompt.id for made in trained for prompt in read_prompts(made) if corpus.overlaps(asked(prompt)))


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


VERSION = 4
GATE = Stage("gate", VERSION, _gate)
GATE_INVALID = Stage("gate", VERSION, _gate_invalid)
LOOK = Stage("look", VERSION, _gate)
"""The same, at prompts that leave a reserve: decided here, or asked further."""


def _publish(out: Path, report: GateReport) -> StageOutcome:
    write_json(out / GATE_REPORT, report)
    write_junit(out / JUNIT, report)
    say(f"gate: {report.state.value}: {report.reasons[0]}")
    states = Counter(check.state.value for check in report.checks)
    return StageOutcome(
        tallies=(Tally(of="checks", total=len(report.checks), parts=dict(states)),),
        metrics={"state": report.state.value, "reasons": list(report.reasons)},
    )
