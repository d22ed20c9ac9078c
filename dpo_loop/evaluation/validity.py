"""May this evaluation be believed at all? Asked before any check: a failure says nothing about the candidate and is INVALID."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dpo_loop.config import WIN_RATES, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.rates import Reference
from dpo_loop.evaluation.sentences import percent
from dpo_loop.exchange import PROMPT_TOO_LONG
from dpo_loop.types import GateState, GradeRow, PolicyName, PolicyRef, Record, Side

EXACT_NATS = 1e-4
"""Per token, mean: float32 engines come nearer, and an update that trains anything goes farther."""
_LONGER = "longer than the engine's context"
_POLICIES: tuple[PolicyName, ...] = ("candidate", "previous", "anchor")


class ValidityResult(Record):
    """state: PASS, INVALID, NEEDS_REVIEW where a person must vouch for how it was graded, or INCONCLUSIVE where too little was asked."""

    id: str
    state: GateState
    why: str


def run_validity(evidence: Evidence, config: GateConfig, context: Context) -> tuple[ValidityResult, ...]:
    return (
        _coverage(evidence),
        _scored(evidence, config),
        _comparisons(evidence, config),
        _distinct(context.candidate, context.previous),
        _moved(evidence, context),
        _size(evidence),
        _grader(context.heuristic_safety, config),
    )


def verdict(id: str, problem: str | None, fine: str, *, state: GateState = GateState.INVALID) -> ValidityResult:
    """`state` where there is a problem."""
    return ValidityResult(id=id, state=GateState.PASS if problem is None else state, why=fine if problem is None else problem)


def _coverage(evidence: Evidence) -> ValidityResult:
    """Every prompt of the evaluation set answered exactly once by each policy, on the side it was asked on, and nothing else."""
    problems = []
    if not evidence.prompts:
        problems.append("the evaluation set is empty")
    for policy in _POLICIES:
        answered = Counter(row.prompt_id for row in evidence.rows if row.policy == policy)
        missing, unknown = evidence.prompts.keys() - answered.keys(), answered.keys() - evidence.prompts.keys()
        twice = [id for id, times in answered.items() if times > 1]
        if missing:
            problems.append(
                f"{policy} has no answer to {len(missing)} of {len(evidence.prompts)} prompts (e.g. {evidence.named([min(missing)])})"
            )
        if unknown:
            problems.append(
                f"{policy} answered {len(unknown)} prompts that are not in the evaluation set (e.g. {evidence.named([min(unknown)])})"
            )
        if twice:
            problems.append(f"{policy} answered {len(twice)} prompts more than once (e.g. {evidence.named([min(twice)])})")
    moved = [row.prompt_id for row in evidence.rows if (p := evidence.prompts.get(row.prompt_id)) and p.side is not row.side]
    if moved:
        problems.append(
            f"{len(moved)} answers are graded on another side than their prompt's (e.g. {evidence.named([min(moved)])})"
        )
    too_long = {row.prompt_id for row in evidence.rows if row.no_answer == PROMPT_TOO_LONG}
    but = f", but for {len(too_long)} that are {_LONGER}" if too_long else ""
    fine = f"all three policies answered all {len(evidence.prompts)} prompts{but}"
    return verdict("coverage", "; ".join(problems) or None, fine)


def _scored(evidence: Evidence, config: GateConfig) -> ValidityResult:
    """Per policy and side, so that a grader which fails on one kind of prompt cannot hide among the others."""
    problems, num_unscored = [], 0
    for policy in _POLICIES:
        for side in Side:
            rows = [row for row in evidence.rows if row.policy == policy and row.side is side]
            # Without a task grader a pass_rate check is INVALID by itself, and a task without an answer still is a hole.
            ungraded_is_fine = side is Side.TASK and not evidence.has_task_grades
            unscored = [row for row in rows if (row.no_answer if ungraded_is_fine else row.grade is None)]
            num_unscored += len(unscored)
            if len(unscored) > config.max_unscored * len(rows):
                share = f"{len(unscored)} of {len(rows)} {side.value} answers of {policy} ({percent(len(unscored) / len(rows))})"
                why = _why(unscored)
                problems.append(f"{share} could not be graded, above max_unscored {percent(config.max_unscored)}{why}")
    fine = (
        f"{num_unscored} answers could not be graded; they count against the candidate"
        if num_unscored
        else "every answer is graded"
    )
    return verdict("scored", "; ".join(problems) or None, fine)


def _why(unscored: Sequence[GradeRow]) -> str:
    num_too_long = sum(row.no_answer == PROMPT_TOO_LONG for row in unscored)
    if not num_too_long:
        return ""
    which = "the" if num_too_long == len(unscored) else f"{num_too_long} of the"
    return f" ({which} prompts are {_LONGER}: raise generation.engine.max_model_len, or take them out of the evaluation set (in a new run))"


def _comparisons(evidence: Evidence, config: GateConfig) -> ValidityResult:
    """Where a check asks for a win rate: every task prompt compared exactly once with that reference."""
    references: list[Reference] = sorted({check.vs for check in config.checks if check.metric in WIN_RATES and check.vs})
    tasks, problems = set(evidence.ids_on(Side.TASK)), []
    for vs in references:
        compared = Counter(comparison.prompt_id for comparison in evidence.comparisons if comparison.vs == vs)
        if missing := tasks - compared.keys():
            problems.append(
                f"{len(missing)} of {len(tasks)} task prompts were not compared with {vs} (e.g. {evidence.named([min(missing)])})"
            )
        if odd := sorted(id for id, times in compared.items() if times > 1 or id not in tasks):
            problems.append(
                f"{len(odd)} comparisons with {vs} are doubled or not of a task prompt (e.g. {evidence.named([odd[0]])})"
            )
    fine = f"all {len(tasks)} task prompts were compared" if references else "no check asks for a win rate"
    return verdict("comparisons", "; ".join(problems) or None, fine)


def _distinct(candidate: PolicyRef, previous: PolicyRef) -> ValidityResult:
    problem = "the candidate has the same weights as the previous policy, so training changed nothing"
    return verdict(
        "distinct", problem if candidate.key == previous.key else None, "the candidate's weights differ from the previous policy's"
    )


def _moved(evidence: Evidence, context: Context) -> ValidityResult:
    """An engine that serves the previous policy in the candidate's name shows in nothing but its answers, unless the canary was reproduced so exactly
    that no other weights can have been served."""
    mine, theirs = (
        {row.prompt_id: row.response for row in evidence.rows if row.policy == policy} for policy in ("candidate", "previous")
    )
    candidate = context.conditions[0].get("candidate") if context.conditions else None
    distance = candidate.canary.get("distance") if candidate and candidate.canary else None
    is_proven = distance is not None and distance < EXACT_NATS
    problem = "every answer of the candidate is the previous policy's, word for word: either training changed nothing that shows, or the engine served the wrong weights"
    same = bool(mine) and mine == theirs and not is_proven
    num = sum(theirs.get(id) != says for id, says in mine.items())
    return verdict(
        "moved", problem if same else None, f"{num} answers differ from the previous policy's", state=GateState.NEEDS_REVIEW
    )


def _size(evidence: Evidence) -> ValidityResult:
    """The smoke split of a built-in set shows that all parts work, in seconds; a round never passes on it."""
    sides = [prompt for prompt in evidence.prompts.values() if prompt.side is not Side.TASK]
    only_smoke = bool(sides) and all(prompt.source.startswith("builtin:") and prompt.source.endswith("/smoke") for prompt in sides)
    problem = "harmful and benign prompts are the smoke split alone, which is too small to pass on: use `split: core`"
    return verdict("size", problem if only_smoke else None, "the evaluation set is no smoke set", state=GateState.INCONCLUSIVE)


def _grader(heuristic_safety: bool, config: GateConfig) -> ValidityResult:
    problem = (
        "refusals were recognised by a keyword heuristic, which cannot pass a round: a person has to read the samples, "
        "or gate.allow_heuristic_judge has to say so"
    )
    fine = (
        "a keyword heuristic graded safety; gate.allow_heuristic_judge allows it"
        if heuristic_safety
        else "safety was graded by a verifier or a judge"
    )
    suspect = heuristic_safety and not config.allow_heuristic_judge
    return verdict("grader", problem if suspect else None, fine, state=GateState.NEEDS_REVIEW)
