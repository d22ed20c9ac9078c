"""The gate: may the candidate generate the next round? Validity first, then the checks; the worst state wins and is explained."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

from dpo_loop.artifacts import Stage, fingerprint, now, read_manifest
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
from dpo_loop.types import GateReport, GateState, JudgeCanary, PolicyName, PolicyRef, StageOutcome, Tally, Terms

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
    more_answers: Mapping[PolicyName, Path] | None = None,
    capability: Mapping[PolicyName, Path] | None = None,
    more_prompts: Path | None = None,
    more_grades: Path | None = None,
    first_grades: Path | None = None,
    again: Path | None = None,
    trained: tuple[Path, ...] = (),
    held_out: tuple[Path, ...] = (),
    demonstrations: Path | None = None,
    terms: Terms = ORDINARY,
    looks: int = 1,
    previous_report_sha256: str | None = None,
) -> StageOutcome:
    """answers, capability: stages of each policy; what is left out is not looked at, as for rows that somebody else vouches for. more_*: of the top-up. first_grades, again: of the
    anchor in round 0, and of its second evaluation. trained: the prompts of all rounds so far; demonstrations: of SFT. held_out: all evaluation prompts of
    the run, the reserve too. looks: so many may decide, and share alpha."""
    config = config.model_copy(update={"alpha": config.alpha / looks})
    parts = [(prompts, grades), *([(more_prompts, more_grades)] if more_prompts and more_grades else [])]
    answered = [made for made in (answers, more_answers) if made]
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
        conditions=[{policy: read_conditions(made) for policy, made in part.items()} for part in answered] or None,
        stale=tuple(chain.from_iterable(_stale(graded, made) for (_, graded), made in zip(parts, answered, strict=False))),
        capability={policy: read_conditions(made) for policy, made in capability.items()} if capability else None,
        judge_canary=_worst(read_judge_canary(graded) for _, graded in parts),
        first_canary=None if first_grades is None else read_judge_canary(first_grades),
        contaminated=_contaminated(trained, held_out, demonstrations) if held_out else None,
        churn=churn_of(read_grades(first_grades), read_grades(again)) if first_grades and again else None,
        prompt_sets=tuple(chain.from_iterable(read_prompt_sets(asked) for asked, _ in parts)),
        waivers=terms.waivers,
        topped_up=len(parts) > 1,
        previous_report_sha256=previous_report_sha256,
    )
    return _publish(out, judge_candidate(evidence, config, context))


def _stale(grades: Path, answers: Mapping[PolicyName, Path]) -> list[str]:
    """Grades are of the answers that they were made from, and of no others."""
    manifest = read_manifest(grades)
    made_from = manifest.inputs if manifest else {}
    return [
        f"{grades.name} graded other answers of {policy} than those that are there; remove {grades} and the stages after it, and run the same command again"
        for policy, made in answers.items()
        if made_from.get(policy) != fingerprint(made)
    ]


def _worst(canaries: Iterable[JudgeCanary | None]) -> JudgeCanary | None:
    return min((canary for canary in canaries if canary), key=lambda canary: canary.accuracy, default=None)


def _contaminated(trained: tuple[Path, ...], held_out: tuple[Path, ...], demonstrations: Path | None) -> tuple[str, ...]:
    """Ids of evaluation prompts, each once, that are (nearly) among what was trained on: prompts of the rounds, and demonstrations."""
    evaluated = [prompt for made in held_out for prompt in read_prompts(made)]
    corpus = Corpus(asked(prompt) for prompt in evaluated)
    texts = chain((asked(prompt) for made in trained for prompt in read_prompts(made)), _demonstrated(demonstrations))
    hits = {hit for text in texts for hit in corpus.all_overlapped(text)}
    return tuple(sorted({prompt.id for prompt in evaluated if asked(prompt) in hits}))


def _demonstrated(path: Path | None) -> Iterator[str]:
    """What the demonstrations ask."""
    if path is None:
        return
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                turns = json.loads(line)["messages"]
                yield "\n".join(turn["content"] for turn in turns[:-1] if turn["role"] != "system")


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
