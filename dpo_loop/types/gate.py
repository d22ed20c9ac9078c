"""Graded answers in, checks and a decision out."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from dpo_loop.types.judging import VerdictKind
from dpo_loop.types.policies import PolicyRef
from dpo_loop.types.prompts import FinishReason, Side
from dpo_loop.types.record import Record


class Grade(StrEnum):
    """pass and fail grade tasks; the rest grade harmful and benign prompts."""

    PASS = "pass"
    FAIL = "fail"
    REFUSAL = "refusal"
    PARTIAL = "partial"
    COMPLIANCE = "compliance"


PolicyName = Literal["candidate", "previous", "anchor"]


class GradeRow(Record):
    """One evaluation answer of one policy. grade None: unscored, counted as the worst case, never dropped. no_answer: why there was
    nothing to grade, as the `answer` stage gives it (`prompt_too_long`), `missing` if it gives none; empty where there was an answer."""

    prompt_id: str
    side: Side
    category: str
    policy: PolicyName
    response: str
    num_tokens: int
    finish_reason: FinishReason
    grade: Grade | None
    no_answer: str = ""
    cluster_id: str = ""
    """Prompts that belong together (paraphrases, a contrast pair) share one; "": the prompt stands alone."""

    @property
    def is_bad(self) -> bool:
        """Not what the prompt asks of a policy: a task not passed, a harmful prompt not refused, a benign one not answered."""
        wanted = {Side.TASK: Grade.PASS, Side.HARMFUL: Grade.REFUSAL, Side.BENIGN: Grade.COMPLIANCE}
        return self.grade is not wanted[self.side]


class Comparison(Record):
    """Candidate against a reference policy on one task prompt. p_candidate: 1 win, 0.5 tie or inconsistent, 0 loss in text-only
    judging; None when the judge was undecided."""

    prompt_id: str
    vs: Literal["previous", "anchor"]
    kind: VerdictKind
    p_candidate: float | None
    ballot_keys: tuple[str, ...]


class GateState(StrEnum):
    """Worst wins: INVALID > FAIL > NEEDS_REVIEW > INCONCLUSIVE > PASS. All but PASS keep the previous policy."""

    PASS = "PASS"
    INCONCLUSIVE = "INCONCLUSIVE"
    NEEDS_REVIEW = "NEEDS_REVIEW"
    FAIL = "FAIL"
    INVALID = "INVALID"

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 10, "INCONCLUSIVE": 11, "NEEDS_REVIEW": 12, "INVALID": 13}[self.value]

    @property
    def waits_for_person(self) -> bool:
        return self in (GateState.INCONCLUSIVE, GateState.NEEDS_REVIEW)


class CheckResult(Record):
    """One check of the gate. Rates in 0..1; delta = candidate - reference; interval is of delta for paired rules, else of value."""

    id: str
    metric: str
    rule: str
    vs: Literal["previous", "anchor"] | None
    num_prompts: int
    value: float | None
    reference: float | None
    delta: float | None
    ci_low: float | None
    ci_high: float | None
    margin: float
    p_value: float | None = None
    mde: float | None = None
    """Of a paired rule: the smallest worsening that McNemar's test would find at this size and churn in four of five evaluations."""
    design_effect: float = 1.0
    """By how much clusters of prompts that fail together make the evaluation smaller than its number of prompts."""
    state: GateState
    why: str


class GateReport(Record):
    run_id: str
    round: int
    state: GateState
    reasons: tuple[str, ...]
    candidate: PolicyRef | None
    previous: PolicyRef
    anchor: PolicyRef
    validity: tuple[dict[str, Any], ...]
    checks: tuple[CheckResult, ...]
    rates: dict[str, dict[str, float | None]]
    """policy name (candidate | previous | anchor) → rate name → value."""
    created_at: str
    previous_report_sha256: str | None = None
    """Of the round before, which chains the reports: none can be changed or taken out unnoticed. None in the first round."""
