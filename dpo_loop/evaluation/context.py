"""What the gate knows beside the answers: whose they are, how they came to be, and what people have decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_loop.types import Conditions, JudgeCanary, PolicyName, PolicyRef, PromptSet, Waiver


@dataclass(frozen=True, slots=True)
class Context:
    """conditions, judge_canary, contaminated, churn: None where the answers were made and graded by somebody else, who vouches for them.

    conditions: of the evaluation and, where there was one, of its top-up. stale: what was made of other answers than those. capability: conditions
    of the capability tasks. first_canary: of round 0. contaminated: ids of the prompts that this run has trained on and that are (nearly) evaluation prompts. churn: metric → share of prompts on which two evaluations of
    the anchor differ. topped_up: whether the reserve of prompts was asked too.
    """

    candidate: PolicyRef
    previous: PolicyRef
    anchor: PolicyRef
    run_id: str
    round: int
    heuristic_safety: bool = False
    anchor_round: int = 0
    conditions: Sequence[Mapping[PolicyName, Conditions]] | None = None
    stale: tuple[str, ...] = ()
    capability: Mapping[PolicyName, Conditions] | None = None
    judge_canary: JudgeCanary | None = None
    first_canary: JudgeCanary | None = None
    contaminated: tuple[str, ...] | None = None
    churn: Mapping[str, float] | None = None
    prompt_sets: tuple[PromptSet, ...] = ()
    waivers: tuple[Waiver, ...] = ()
    topped_up: bool = False
    previous_report_sha256: str | None = None

    @property
    def policies(self) -> dict[PolicyName, PolicyRef]:
        return {"candidate": self.candidate, "previous": self.previous, "anchor": self.anchor}
