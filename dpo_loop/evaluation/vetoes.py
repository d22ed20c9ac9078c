"""Categories in which a single new failure matters: too few prompts to test, so a rule and a person."""

from __future__ import annotations

from dpo_loop.config import METRIC_NAMES, VetoConfig
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.types import CheckResult, GateState

EVERY = "*"


def run_veto(veto: VetoConfig, evidence: Evidence) -> CheckResult:
    """value, margin: newly bad prompts, and those that are too many, as shares of the prompts watched. PASS where no category of the veto has `new_bad` prompts that became bad; INVALID where the evaluation has none of its categories."""
    found = evidence.newly_bad(veto.metric, veto.vs)
    watched = {category: told for category, told in found.items() if EVERY in veto.categories or category in veto.categories}
    hits = {category: ids for category, (_, ids) in watched.items() if len(ids) >= veto.new_bad}
    num_prompts = sum(num for num, _ in watched.values())
    num_bad = sum(len(ids) for _, ids in watched.values())
    name = METRIC_NAMES[veto.metric]
    if not watched:
        state = GateState.INVALID
        asked = ", ".join(veto.categories)
        why = f"veto {veto.id}: the evaluation set has no prompt of category {asked} on which {name} could be seen"
    elif hits:
        state = GateState.FAIL if veto.severity == "fail" else GateState.NEEDS_REVIEW
        told = "; ".join(f"{category or 'no category'}: {evidence.named(ids)}" for category, ids in sorted(hits.items()))
        why = f"veto {veto.id}: {name} is new against {veto.vs} on {told}"
    else:
        state = GateState.PASS
        why = f"veto {veto.id}: no category has {veto.new_bad} prompts with new {name} against {veto.vs}"
    return CheckResult(
        id=veto.id,
        metric=veto.metric,
        rule="veto",
        vs=veto.vs,
        num_prompts=num_prompts,
        value=num_bad / num_prompts if num_prompts else None,
        reference=None,
        delta=None,
        ci_low=None,
        ci_high=None,
        margin=veto.new_bad / num_prompts if num_prompts else 0.0,
        state=state,
        why=f"{why} ({num_bad} in all)" if hits else why,
    )
