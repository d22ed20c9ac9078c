"""Were the answers made and graded as they should have been? What the rows alone cannot show."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_loop.config import METRIC_NAMES, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.rates import SIDE_OF_METRIC
from dpo_loop.evaluation.sentences import percent
from dpo_loop.evaluation.validity import ValidityResult, verdict
from dpo_loop.types import Conditions, JudgeCanary, PolicyName

MIN_EFFECT = 0.5
"""Of the adapter canary: below it an engine is closer to the bare base than to the policy."""
_SAME = ("prompts_sha256", "template_sha256", "decoding", "engine", "versions")
_NAMES = {"prompts_sha256": "the prompts", "template_sha256": "the chat template"}


def run_provenance(evidence: Evidence, config: GateConfig, context: Context) -> Iterator[ValidityResult]:
    """One result for everything that is known of; rows of somebody else have none."""
    if context.conditions is not None:
        yield _adapter(context)
        yield _conditions(context.conditions)
    if context.judge_canary is not None:
        yield _judge_canary(context.judge_canary, context.first_canary, config, is_heuristic=context.heuristic_safety)
    if context.contaminated is not None:
        yield _contamination(context.contaminated, len(evidence.prompts), config)
    if context.churn is not None:
        yield _churn(context.churn, evidence, config)


def _adapter(context: Context) -> ValidityResult:
    """An engine that serves the bare base in a policy's name would have the base graded (vllm#55193)."""
    problems, shown = [], []
    assert context.conditions is not None
    for name, policy in context.policies.items():
        said = context.conditions.get(name)
        if said is None:
            problems.append(f"nothing says how {name} was served")
        elif said.policy_key != policy.key:
            problems.append(f"the answers of {name} are those of another policy ({said.policy_key}, not {policy.key})")
        elif said.has_adapter and said.canary is None:
            problems.append(f"{name} has an adapter, and nothing shows that the engine served it")
        elif said.canary is not None:
            effect = said.canary.get("effect")
            if effect is not None and effect < MIN_EFFECT:
                problems.append(f"the engine did not apply the adapter of {name}: {effect:.2f} of its effect was seen")
            if name == "candidate":
                shown.append(_told(said.canary))
    fine = "the engine served each policy with its adapter" + (f" ({shown[0]})" if shown else "")
    return verdict("adapter", "; ".join(problems) or None, fine)


def _told(canary: Mapping[str, float | int | None]) -> str:
    effect, distance = canary.get("effect"), canary.get("distance")
    parts = [f"{effect:.2f} of the candidate's effect"] if effect is not None else []
    parts += [f"log-probs within {distance:.1e} nats of transformers and peft"] if distance is not None else []
    return ", ".join(parts)


def _conditions(conditions: Mapping[PolicyName, Conditions]) -> ValidityResult:
    mine, problems = conditions.get("candidate"), []
    for name in ("previous", "anchor"):
        theirs = conditions.get(name)
        if mine is None or theirs is None:
            problems.append(f"nothing says how {name if mine else 'candidate'} answered")
            continue
        differing = [field for field in _SAME if getattr(mine, field) != getattr(theirs, field)]
        problems += [f"{_difference(field, getattr(mine, field), getattr(theirs, field))} for {name}" for field in differing]
    way_out = ". Answer anew under the same conditions: in a new run, or with the versions of the first rounds"
    problem = f"policies answered under different conditions: {'; '.join(problems)}{way_out}" if problems else None
    return verdict("conditions", problem, "same prompts, chat template, decoding, engine and versions for all three policies")


def _difference(field: str, mine: Any, theirs: Any) -> str:
    if not isinstance(mine, dict):
        return f"{_NAMES[field]} differ"
    changed = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    return ", ".join(f"{field}.{name} was {theirs.get(name)}, not {mine.get(name)}," for name in changed)


def _judge_canary(canary: JudgeCanary, first: JudgeCanary | None, config: GateConfig, *, is_heuristic: bool) -> ValidityResult:
    """A heuristic is shown, not refused: that it cannot pass a round is said elsewhere."""
    told = f"{canary.num_right} of {canary.num_rows} answers whose grade is known were graded right ({percent(canary.accuracy)})"
    problems = []
    if canary.accuracy < config.min_judge_accuracy:
        wrong = f"; wrong or ungraded: {', '.join(canary.wrong[:5])}" if canary.wrong else ""
        problems.append(f"{told}, fewer than min_judge_accuracy {percent(config.min_judge_accuracy)}{wrong}")
    if first is not None and canary.accuracy < first.accuracy - config.max_judge_drop - 1e-9:
        problems.append(f"{told}, and in round 0 it was {percent(first.accuracy)}: the judge has changed")
    if is_heuristic:
        return verdict("judge_canary", None, f"{told}, by a keyword heuristic")
    problem = f"the safety judge {canary.grader} cannot be relied on: {'; '.join(problems)}" if problems else None
    return verdict("judge_canary", problem, f"the safety judge {canary.grader}: {told}")


def _contamination(hits: tuple[str, ...], num_prompts: int, config: GateConfig) -> ValidityResult:
    told = f"{len(hits)} prompts that this run has trained on are (nearly) among its {num_prompts} evaluation prompts"
    way_out = f", above max_contaminated {percent(config.max_contaminated)} (e.g. {min(hits, default='')}). Take them out of the pool, in a new run"
    too_many = len(hits) > config.max_contaminated * num_prompts
    fine = told if hits else "nothing that this run has trained on is (nearly) an evaluation prompt"
    return verdict("contamination", told + way_out if too_many else None, fine)


def _churn(churn: Mapping[str, float], evidence: Evidence, config: GateConfig) -> ValidityResult:
    """How much two evaluations of one policy differ is no fault. What follows from it: whether this evaluation is large enough for its margins."""
    told = ", ".join(f"{METRIC_NAMES[metric]} {percent(share)}" for metric, share in churn.items())
    fine = f"two evaluations of the anchor itself differ on so many prompts: {told}"
    if chances := _chances(churn, evidence, config):
        id, chance = min(chances.items(), key=lambda item: item[1])
        fine += f"; a candidate that is no worse passes check {id} with probability {chance:.2f}" + (
            ", the others more often" if len(chances) > 1 else ""
        )
    return verdict("churn", None if churn else "the anchor was evaluated twice, and no prompt was graded both times", fine)


def _chances(churn: Mapping[str, float], evidence: Evidence, config: GateConfig) -> dict[str, float]:
    """check → probability that a candidate exactly as good as its reference passes it, prompts taken as independent."""
    from dpo_loop.evaluation.statistics.power import pass_probability  # scipy takes half a second to import

    sizes = {check.id: len(evidence.ids_on(SIDE_OF_METRIC[check.metric])) for check in config.checks if check.metric in churn}
    return {
        check.id: pass_probability(0.0, sizes[check.id], churn=churn[check.metric] / 2, margin=check.margin, alpha=config.alpha)
        for check in config.checks
        if check.rule == "non_inferior" and sizes.get(check.id)
    }
