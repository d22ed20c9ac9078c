"""Were the answers made and graded as they should have been? What the rows alone cannot show."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_loop.config import METRIC_NAMES, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.rates import SIDE_OF_METRIC
from dpo_loop.evaluation.sentences import percent
from dpo_loop.evaluation.validity import ValidityResult, verdict
from dpo_loop.exchange import HEURISTIC, MIN_EFFECT
from dpo_loop.types import Conditions, JudgeCanary, PolicyName, PolicyRef

_SAME = ("template_sha256", "decoding", "engine", "versions")


def run_provenance(evidence: Evidence, config: GateConfig, context: Context) -> Iterator[ValidityResult]:
    """One result for everything that is known of; rows of somebody else have none."""
    if context.conditions is not None:
        yield _adapter(context, context.conditions)
        yield _conditions(context.conditions, context.stale)
    if context.capability is not None:
        yield _capability(context, context.capability)
    if context.judge_canary is not None:
        yield _judge_canary(context.judge_canary, context.first_canary, config)
    if context.contaminated is not None:
        yield _contamination(context.contaminated, evidence, config)
    if context.churn is not None:
        yield _churn(context.churn, evidence, config)


def _adapter(context: Context, parts: Sequence[Mapping[PolicyName, Conditions]]) -> ValidityResult:
    """An engine that serves the bare base in a policy's name would have the base graded (vllm#55193)."""
    problems = [
        problem
        for part in parts
        for name, policy in context.policies.items()
        if (problem := _serving_problem(name, policy, part.get(name))) is not None
    ]
    candidate = parts[0].get("candidate")
    fine = "the engine served the weights of each policy" + (f" ({told})" if candidate and (told := _told(candidate)) else "")
    return verdict("adapter", "; ".join(dict.fromkeys(problems)) or None, fine)


def _serving_problem(name: PolicyName, policy: PolicyRef, said: Conditions | None) -> str | None:
    if said is None:
        return f"nothing says how {name} was served"
    if said.policy_key != policy.key:
        return f"the answers of {name} are those of another policy ({said.policy_key}, not {policy.key})"
    if said.canary is None:
        return f"{name} has an adapter, and nothing shows that the engine served it" if said.has_adapter else None
    effect, distance = said.canary.get("effect"), said.canary.get("distance")
    if distance is None or not math.isfinite(distance):
        return f"nothing shows how near the engine's log-probs of {name} are to those of transformers and peft"
    if effect is not None and not effect >= MIN_EFFECT:
        return f"the engine did not apply the adapter of {name}: {effect:.2f} of its effect was seen"
    return None


def _told(said: Conditions) -> str:
    if not said.canary or said.canary.get("distance") is None:
        return ""
    effect, distance = said.canary.get("effect"), said.canary.get("distance")
    near = f"the candidate's log-probs are within {distance:.1e} nats of transformers and peft"
    seen = (
        "its adapter's effect is too small to be told from noise"
        if effect is None
        else f"{effect:.2f} of its adapter's effect was seen"
    )
    return f"{near}, {seen}" if said.has_adapter else near


def _conditions(parts: Sequence[Mapping[PolicyName, Conditions]], stale: tuple[str, ...]) -> ValidityResult:
    """Within a part all policies were asked the same prompts; everything else is equal throughout."""
    first, problems = parts[0].get("candidate"), list(stale)
    for part in parts:
        if len({said.prompts_sha256 for said in part.values()}) > 1:
            problems.append("the policies were not asked the same prompts")
        for name in ("candidate", "previous", "anchor"):
            said = part.get(name)
            if first is None or said is None:
                problems.append(f"nothing says how {name} answered")
            else:
                problems += [
                    _difference(field, getattr(first, field), getattr(said, field), name)
                    for field in _SAME
                    if getattr(first, field) != getattr(said, field)
                ]
    way_out = "" if stale else _way_out(parts)
    problem = f"policies answered under different conditions: {'; '.join(dict.fromkeys(problems))}{way_out}" if problems else None
    return verdict("conditions", problem, "same prompts, chat template, decoding, engine and versions for all three policies")


def _capability(context: Context, conditions: Mapping[PolicyName, Conditions]) -> ValidityResult:
    """The tasks of capability, which other programs may have played, are held to the same."""
    problems = [
        f"capability tasks: {problem}"
        for name, policy in context.policies.items()
        if (problem := _serving_problem(name, policy, conditions.get(name))) is not None
    ]
    mine = conditions.get("candidate")
    for name in ("previous", "anchor"):
        if mine is None or (theirs := conditions.get(name)) is None:
            continue
        if mine.prompts_sha256 != theirs.prompts_sha256:
            problems.append(f"capability tasks: {name} was asked other items")
        problems += [
            f"capability tasks: {_difference(field, getattr(mine, field), getattr(theirs, field), name)}"
            for field in _SAME
            if getattr(mine, field) != getattr(theirs, field)
        ]
    return verdict(
        "capability",
        "; ".join(dict.fromkeys(problems)) or None,
        "all three policies did the same capability tasks under the same conditions",
    )


def _difference(field: str, mine: Any, theirs: Any, name: str) -> str:
    if not isinstance(mine, dict):
        return f"the chat template of {name} is another one"
    changed = [each for each in sorted({*mine, *theirs}) if mine.get(each) != theirs.get(each)]
    return f"for {name}, " + ", ".join(f"{field}.{each} was {theirs.get(each)}, not {mine.get(each)}" for each in changed)


def _way_out(parts: Sequence[Mapping[PolicyName, Conditions]]) -> str:
    anchor = parts[0].get("anchor")
    wanted = " ".join(f"{package}=={version}" for package, version in sorted(anchor.versions.items())) if anchor else ""
    with_them = f"with the packages that the anchor answered with ({wanted}) the next round counts again; " if wanted else ""
    return f". The round cannot be mended: {with_them}else begin a new run"


def _judge_canary(canary: JudgeCanary, first: JudgeCanary | None, config: GateConfig) -> ValidityResult:
    """A keyword heuristic is shown, not refused: that it cannot pass a round is said elsewhere."""
    told = f"{_right_of(canary)}, by a keyword heuristic" if not _shares(canary) else f"{canary.grader}: {_right_of(canary)}"
    return verdict("judge_canary", canary_problem(canary, first, config), told)


def canary_problem(canary: JudgeCanary, first: JudgeCanary | None, config: GateConfig) -> str | None:
    """Why the graders of safety cannot be relied on, each on the rows that it graded; None where they can. first: of round 0."""
    floor = f"min_judge_accuracy {percent(config.min_judge_accuracy)}"
    problems = [
        f"{name} graded {right} of {num} answers whose grade is known right, below {floor}"
        for name, (right, num) in _shares(canary).items()
        if right < config.min_judge_accuracy * num - 1e-9
    ]
    if not _shares(canary):
        return None
    if canary.sensitivity is not None and canary.sensitivity < config.min_judge_accuracy - 1e-9:
        problems.append(f"only {percent(canary.sensitivity)} of the answers that comply were called so, below {floor}")
    if first is not None and canary.accuracy < first.accuracy - config.max_judge_drop - 1e-9:
        problems.append(f"{_right_of(canary)}, and in round 0 it was {percent(first.accuracy)}: the judge has changed")
    wrong = f" (wrong or ungraded: {', '.join(canary.wrong[:5])})" if canary.wrong else ""
    return f"the grader of safety cannot be relied on: {'; '.join(problems)}{wrong}" if problems else None


def _right_of(canary: JudgeCanary) -> str:
    return f"{canary.num_right} of {canary.num_rows} answers whose grade is known were graded right ({percent(canary.accuracy)})"


def _shares(canary: JudgeCanary) -> dict[str, tuple[int, int]]:
    """grader → (right, in all), without keyword heuristics."""
    shares = canary.by_grader or {canary.grader: (canary.num_right, canary.num_rows)}
    return {name: share for name, share in shares.items() if name != HEURISTIC}


def _contamination(hits: tuple[str, ...], evidence: Evidence, config: GateConfig) -> ValidityResult:
    """hits: evaluation prompts, each once."""
    told = f"{len(hits)} of {len(evidence.prompts)} evaluation prompts are (nearly) among those that this run has trained on"
    way_out = f", above max_contaminated {percent(config.max_contaminated)} ({evidence.named(hits)}). Take them out of what is trained on, in a new run"
    too_many = len(hits) > config.max_contaminated * len(evidence.prompts)
    fine = told if hits else "nothing that this run has trained on is (nearly) an evaluation prompt"
    return verdict("contamination", told + way_out if too_many else None, fine)


def _churn(churn: Mapping[str, float], evidence: Evidence, config: GateConfig) -> ValidityResult:
    """How much two evaluations of one policy differ is no fault. What follows from it: whether this evaluation is large enough for its margins."""
    told = ", ".join(f"{METRIC_NAMES[metric]} {percent(share)}" for metric, share in churn.items())
    fine = f"two evaluations of the start policy differ on so many prompts: {told}"
    if chances := _chances(churn, evidence, config):
        id, chance = min(chances.items(), key=lambda item: item[1])
        fine += f"; a candidate that is no worse passes check {id} with probability {chance:.2f}" + (
            ", the others more often" if len(chances) > 1 else ""
        )
    return verdict("churn", None if churn else "the start policy was evaluated twice, and no prompt was graded both times", fine)


def _chances(churn: Mapping[str, float], evidence: Evidence, config: GateConfig) -> dict[str, float]:
    """check → probability that a candidate exactly as good as its reference passes it, prompts taken as independent."""
    from dpo_loop.evaluation.statistics.power import pass_probability  # scipy takes half a second to import

    sizes = {check.id: len(evidence.ids_on(SIDE_OF_METRIC[check.metric])) for check in config.checks if check.metric in churn}
    return {
        check.id: pass_probability(0.0, sizes[check.id], churn=churn[check.metric] / 2, margin=check.margin, alpha=config.alpha)
        for check in config.checks
        if check.rule == "non_inferior" and sizes.get(check.id)
    }
