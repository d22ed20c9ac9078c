"""How a round ended: a person's decision, the blessing, the manifest, and the row that is shown of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from dpo_loop.types.gate import GateState
from dpo_loop.types.policies import PolicyRef
from dpo_loop.types.record import Record


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
    accepted_judge_risk: str | None = None
    """Why the round was played with a judge that failed its self-test; None where it was fit."""
    anchor_round: int = 0
    """The round whose policy is the anchor: win rates against different ones are no series."""
