"""Graded answers in, checks and a decision out."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, model_validator

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
    rationale: str = ""
    """Why, in the words of the judge that graded it; "" where a program did."""
    cluster_id: str = ""
    """Prompts that belong together (paraphrases, a contrast pair) share one; "": the prompt stands alone."""

    @model_validator(mode="after")
    def _grade_fits_side(self) -> GradeRow:
        if self.grade is not None and (self.grade in (Grade.PASS, Grade.FAIL)) != (self.side is Side.TASK):
            raise ValueError(
                f"{self.grade.value} is no grade of a {self.side.value} prompt: tasks pass or fail, others are refusal, partial or compliance"
            )
        return self

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


class CapabilityRow(Record):
    """One item of a capability task, answered by one policy. measure: `correct`, value 1 or 0; or `nll`, value the negative log-likelihood of a
    text in nats, summed over its weight tokens. value None: the item could not be scored, which counts against the candidate."""

    task: str
    item_id: str
    measure: Literal["correct", "nll"]
    value: float | None
    weight: float = 1.0
    response: str = ""


class Conditions(Record):
    """Under which one policy answered the evaluation: what must be equal for all that are compared, but for the policy itself.

    prompts_sha256: of the ids that were asked, sorted. canary: the figures that showed that the engine serves the policy's adapter; None for a bare
    base without one. has_adapter: whether there was an adapter to be served.
    """

    policy_key: str
    has_adapter: bool
    canary: dict[str, float | int | None] | None
    prompts_sha256: str
    template_sha256: str
    decoding: dict[str, float | int]
    engine: dict[str, Any]
    versions: dict[str, str]


class JudgeCanary(Record):
    """How a grader of safety did on answers whose right grade is known, this round. Rates in 0..1; None where there is nothing to take one of.

    sensitivity: share of complying answers (partial ones included) that it called so; specificity: share of refusals that it called so.
    kappa: Cohen's. by_kind: kind of row → (right, in all). wrong: ids of rows, those left ungraded included.
    """

    grader: str
    num_rows: int
    num_right: int
    num_ungraded: int
    accuracy: float
    kappa: float | None
    sensitivity: float | None
    specificity: float | None
    by_kind: dict[str, tuple[int, int]] = Field(default_factory=dict)
    by_grader: dict[str, tuple[int, int]] = Field(default_factory=dict)
    """Who graded which rows, where harmful and benign prompts have graders of their own: name → (right, in all)."""
    wrong: tuple[str, ...] = ()


class PromptSet(Record):
    """Where evaluation prompts came from. skipped: why an optional set is not there, "" where it is."""

    source: str
    revision: str = ""
    licence: str = ""
    sha256: str = ""
    """Of the ids of its prompts, in order."""
    num_prompts: int
    skipped: str = ""


class Waiver(Record):
    """A person lets a check of later rounds be broken, for a while and as badly as it was: bound to the report that made them write it.

    state, harm: of the check then; a check that ends worse is not covered. vs, anchor_round: a waiver against an anchor ends with it.
    """

    check_id: str
    state: str
    harm: float
    vs: str | None = None
    anchor_round: int = 0
    reviewer: str = Field(min_length=1)
    reason: str = Field(min_length=1)
    report_sha256: str
    expires_round: int
    """The last round that it holds for."""
    waived_at: str


class Terms(Record):
    """What people have decided about a round before it began, and holds for all of it."""

    anchor_round: int = 0
    """Whose policy is the anchor: the start policy, or that of the promoted round to which a person moved it."""
    waivers: tuple[Waiver, ...] = ()


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
    """One check of the gate. Rates in 0..1; delta = candidate - reference; interval is of delta for paired rules, else of value.

    Of a perplexity, value and reference are perplexities, and delta, interval and margin the relative rise.
    """

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
    task: str | None = None
    """Of a capability check."""
    num_partial: int | None = None
    """Of harm and over-refusal: how many of the candidate's bad answers are partial ones, which neither refuse nor do all that was asked."""
    waived_by: str | None = None
    """Who lets this check be broken, until when and why; then its state does not count."""
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
    schema_version: int = 1
    config_sha256: str = ""
    """Of the gate's config as canonical JSON."""
    anchor_round: int = 0
    """The round whose policy is the anchor: 0, or where a person moved it to."""
    prompt_sets: tuple[PromptSet, ...] = ()
    conditions: dict[str, Any] = Field(default_factory=dict)
    """How all policies answered: decoding, engine, versions, hash of the chat template."""
    judge_canary: JudgeCanary | None = None
    churn: dict[str, float] = Field(default_factory=dict)
    """metric → share of prompts on which two evaluations of the anchor itself differ (A/A)."""
    topped_up: bool = False
    """Whether the reserve of prompts was asked too, since the first look could not decide; alpha is halved for both looks."""
