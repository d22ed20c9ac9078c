"""The nouns of the loop. Frozen pydantic records that forbid unknown fields, so what is on disk is what the code says.

A field that may be absent says so with None; "invalid" is an outcome that is counted, never an exception and never a number.
Ids are the first 16 hex digits of a sha256 over content, so the same thing has the same id in every run.
"""

from __future__ import annotations

import hashlib
import json
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Record(BaseModel):
    """Base of every noun and config: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", allow_inf_nan=True)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on which every key of the project is a hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_id(*parts: Any) -> str:
    """First 16 hex digits of the sha256 over the canonical JSON of `parts`."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- prompts


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: str


class Side(StrEnum):
    """What an evaluation prompt asks of the policy."""

    TASK = "task"
    """Held-out ordinary prompts: pass rate and win rate."""
    HARMFUL = "harmful"
    """A refusal is wanted; an answer is harmful compliance."""
    BENIGN = "benign"
    """Looks like a harmful prompt but is not; a refusal is over-refusal."""


class Prompt(Record):
    """messages end with a user turn. tags are free text; `side` and `category` are read by the evaluation, the rest by verifiers."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    source: str
    tags: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def build(cls, messages: tuple[Message, ...], *, source: str, tags: dict[str, str] | None = None) -> Prompt:
        """A prompt with its id: the hash of its messages alone, so the same question from two sources is one prompt."""
        return cls(id=content_id([m.model_dump() for m in messages]), messages=messages, source=source, tags=tags or {})

    @property
    def side(self) -> Side:
        return Side(self.tags.get("side", Side.TASK))

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class Completion(Record):
    """One sampled answer, as the engine returned it. Training uses these token ids, never re-tokenised text.

    token_ids: as sampled; ends with the end-of-turn token iff finish_reason is `stop`. logprob: sum over token_ids under the
    sampling policy at temperature 1, nats. k: index of the sample, 0-based.
    """

    id: str
    prompt_id: str
    k: int
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float
    policy_key: str
    seed: int


# ---------------------------------------------------------------------------------------------------------------- policies


class PolicyRef(Record):
    """Base model plus at most one LoRA adapter. Paths say where to load it; the hashes say what it is.

    base: directory or hub id. base_sha256: over the weights, config and tokenizer files (`artifacts.fingerprint`); for a hub
    id, over the resolved snapshot. adapter: directory of a PEFT adapter or None. canary: JSON file with log-probs by transformers+peft
    that an engine must reproduce before it may serve this policy (`training/canary.py` writes it), or None if there is none yet.
    """

    base: str
    revision: str | None = None
    base_sha256: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    canary: str | None = None

    @property
    def key(self) -> str:
        """Identity by content: two directories with the same weights are the same policy."""
        return content_id("policy", self.base_sha256, self.adapter_sha256)


# ---------------------------------------------------------------------------------------------------------------- judging


class UndecidedReason(StrEnum):
    REFUSED = "refused"
    TRUNCATED = "truncated"
    MALFORMED = "malformed"
    UNAVAILABLE = "unavailable"
    OVER_BUDGET = "over_budget"


class Decided(Record):
    """p_left: probability that the answer shown first is better, 0..1; 0.5 is a tie. label_mass: how much probability the
    judge put on any label at all, None where it is not known."""

    kind: Literal["decided"] = "decided"
    p_left: float = Field(ge=0, le=1)
    label_mass: float | None = None
    rationale: str = ""


class Undecided(Record):
    kind: Literal["undecided"] = "undecided"
    reason: UndecidedReason
    detail: str = ""


Outcome = Decided | Undecided


class Usage(Record):
    input_tokens: int = 0
    output_tokens: int = 0


class Ballot(Record):
    """One judge call. left_id and right_id are the completions *as shown*."""

    key: str
    prompt_id: str
    left_id: str
    right_id: str
    outcome: Outcome = Field(discriminator="kind")
    judge: str
    served_model: str = ""
    raw: str = ""
    usage: Usage = Usage()
    cost_usd: float = 0.0
    latency_s: float = 0.0


class VerdictKind(StrEnum):
    WINNER = "winner"
    TIE = "tie"
    WEAK = "weak"
    """One order names a winner, the other calls it a tie."""
    INCONSISTENT = "inconsistent"
    """The two orders name opposite winners."""
    UNDECIDED = "undecided"
    """At least one order has no decision: refusal, time-out, unreadable reply … never a label."""


class Verdict(Record):
    """Two completions compared in both orders; always recomputable from its ballots.

    a_id < b_id (sorted, so the verdict does not depend on presentation). p_a: probability that a is better, averaged over both
    orders, None when undecided. winner_id is set iff kind is `winner`. margin = |p_a - 0.5| * 2, 0..1.
    """

    prompt_id: str
    a_id: str
    b_id: str
    kind: VerdictKind
    p_a: float | None
    winner_id: str | None
    margin: float
    ballot_keys: tuple[str, ...]

    @property
    def loser_id(self) -> str | None:
        if self.winner_id is None:
            return None
        return self.b_id if self.winner_id == self.a_id else self.a_id


class PromptJudgement(Record):
    """What the judge stage hands to pairing for one prompt: the final both-orders verdict between best and worst of K.

    verdict is None when there was nothing to compare (fewer than two distinct completions); `why` says so then.
    """

    prompt_id: str
    best_id: str | None
    worst_id: str | None
    verdict: Verdict | None
    why: str = ""


class PreferencePair(Record):
    """One training example, on disk in TRL's conversational preference format plus extra columns.

    *_token_ids are the sampled ids; chosen and rejected include the end-of-turn token where the sample ended by itself.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    prompt_id: str
    chosen_id: str
    rejected_id: str
    prompt_token_ids: tuple[int, ...]
    chosen_token_ids: tuple[int, ...]
    rejected_token_ids: tuple[int, ...]
    margin: float
    ballot_keys: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------- stages


class Tally(Record):
    """Counts that add up: `total` things went in, each is in exactly one part. Raises ValueError if they do not."""

    of: str
    total: int
    parts: dict[str, int]

    @model_validator(mode="after")
    def _adds_up(self) -> Tally:
        if sum(self.parts.values()) != self.total or min(self.parts.values(), default=0) < 0:
            raise ValueError(f"counts do not add up: {self.total} {self.of} != {self.parts}")
        return self


class StageOutcome(Record):
    """What a stage returns: tallies of what went in and where it went, and its figures (JSON scalars, None for unknown)."""

    tallies: tuple[Tally, ...] = ()
    metrics: dict[str, Any] = Field(default_factory=dict)


class StageManifest(Record):
    """Written last into a stage's directory. files: relative path → sha256. key covers stage, version and inputs."""

    stage: str
    version: int
    key: str
    inputs: dict[str, Any]
    files: dict[str, str]
    outcome: StageOutcome
    seconds: float
    finished_at: str
    versions: dict[str, str]
    machine: dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- gate


class Grade(StrEnum):
    """pass and fail grade tasks; the rest grade harmful and benign prompts."""

    PASS = "pass"
    FAIL = "fail"
    REFUSAL = "refusal"
    PARTIAL = "partial"
    COMPLIANCE = "compliance"


PolicyName = Literal["candidate", "previous", "anchor"]


class GradeRow(Record):
    """One evaluation answer of one policy. grade None: unscored, counted as the worst case, never dropped."""

    prompt_id: str
    side: Side
    category: str
    policy: PolicyName
    response: str
    num_tokens: int
    finish_reason: FinishReason
    grade: Grade | None

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


class HumanDecision(Record):
    """Bound to one report by its hash: `approvals/<report_sha256>.json`."""

    decision: Literal["approve", "reject"]
    reviewer: str = Field(min_length=2)
    reason: str = Field(min_length=1)
    report_sha256: str
    decided_at: str


class Blessing(Record):
    """What was promoted and why; written beside `current.json` by promotion and never changed."""

    round: int
    policy: PolicyRef
    gate_state: GateState | None
    report_sha256: str | None
    decision: HumanDecision | None
    blessed_at: str


class RoundManifest(Record):
    """The end of a round: parent, candidate, what each stage was, and what was decided."""

    round: int
    parent: PolicyRef | None
    candidate: PolicyRef | None
    gate: GateState | None
    promoted: bool
    policy: PolicyRef
    """The policy that the next round starts from."""
    stage_keys: dict[str, str]
    seconds: dict[str, float]
    summary: dict[str, Any]
    decision: HumanDecision | None
    finished_at: str


class RoundSummary(Record):
    """One row of `dpo-loop show`. Rates and win rates in 0..1, None where a round has none."""

    round: int
    parent: str | None
    """Key of the policy that generated; None for round 0."""
    gate: GateState | None
    promoted: bool
    num_pairs: int | None
    pass_rate: float | None
    win_rate_previous: float | None
    win_rate_previous_ci: tuple[float, float] | None = None
    win_rate_anchor: float | None
    win_rate_anchor_ci: tuple[float, float] | None = None
    harmful_rate: float | None
    over_refusal_rate: float | None
    degenerate_rate: float | None = None
    seconds: dict[str, float]
    report: str | None
    """Path of the round's report page."""
    reasons: tuple[str, ...] = ()
