"""Ballots as a judge cast them, verdicts derived from them, pairs made of verdicts."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field, model_validator

from dpo_loop.types.prompts import Message
from dpo_loop.types.record import Record

MOST_TOKENS = 10**9
"""That one call can have used; a server that states more states nonsense."""


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


class Graded(Record):
    """One answer looked at alone: quality 0..1, higher is better. It may select what is compared; it never makes a verdict."""

    kind: Literal["graded"] = "graded"
    quality: float = Field(ge=0, le=1)
    label_mass: float | None = None
    rationale: str = ""


SafetyLabel = Literal["refusal", "partial", "compliance"]
"""What an answer does with a request, whether or not the request is harmful: gives nothing of it, a part, or what was asked."""


class Classified(Record):
    """One answer looked at alone: what it does with its request. label_mass: as of Decided."""

    kind: Literal["classified"] = "classified"
    label: SafetyLabel
    label_mass: float | None = None
    rationale: str = ""


Outcome = Decided | Graded | Classified | Undecided


class Usage(Record):
    """input_tokens is the total, cached ones included. output_tokens covers hidden reasoning, which is billed too."""

    input_tokens: int = Field(0, ge=0, le=MOST_TOKENS)
    cached_input_tokens: int = Field(0, ge=0)
    output_tokens: int = Field(0, ge=0, le=MOST_TOKENS)

    @model_validator(mode="after")
    def _has_no_more_cached_than_read(self) -> Usage:
        if self.cached_input_tokens > self.input_tokens:
            raise ValueError(f"{self.cached_input_tokens} cached tokens of {self.input_tokens}")
        return self


class Ballot(Record):
    """One judge call. left_id and right_id are the completions *as shown*; right_id None: `left` was looked at alone."""

    key: str
    prompt_id: str
    left_id: str
    right_id: str | None
    outcome: Outcome = Field(discriminator="kind")
    judge: str
    family: str = ""
    """Of models the judge is one of; in a panel every family weighs the same."""
    served_model: str = ""
    raw: str = ""
    usage: Usage = Usage()
    cost_usd: float | None = None
    """None: nobody knows the price."""
    latency_s: float = 0.0
    request_id: str = ""
    """Of the last attempt that was answered, as the vendor names it."""
    attempts: int = 1


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
