"""The seam to whoever judges: one request in, one reply out.

A *backend* knows one vendor or one program. It sees two texts in the order they are shown and nothing else: no swap, no panel, no
ledger, no ids. Everything that makes a label trustworthy (both orders, verdicts, the ledger) stands on this side of the seam.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from dpo_loop.types import Classified, Decided, Graded, Outcome, Prompt, Record, Undecided, UndecidedReason, Usage
from judges.config import (
    AnthropicJudge,
    GuardGrader,
    OpenAICompatibleJudge,
    OpenAIJudge,
    RemoteModel,
    RewardModelJudge,
    Single,
    VerifierJudge,
    VllmLabelJudge,
    VllmRunBatchJudge,
)

if TYPE_CHECKING:
    from judges.batches.vendor import BatchVendor
    from judges.budget import Purse
    from judges.dialect import Dialect
    from judges.ledger import Ledger
    from judges.remote import Sender


class Question(StrEnum):
    COMPARE = "compare"
    """Which of two answers is better?"""
    GRADE = "grade"
    """How good is this answer?"""
    CLASSIFY = "classify"
    """Does this answer refuse, give a part, or comply?"""


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """left is shown first; right None: `left` is looked at alone, and graded unless it is to be classified. key: of this call in the ledger;
    it names the call at the vendor and seeds the fences of the request."""

    key: str
    prompt: Prompt
    left: str
    right: str | None
    is_classified: bool = False

    @property
    def question(self) -> Question:
        if self.is_classified:
            return Question.CLASSIFY
        return Question.GRADE if self.right is None else Question.COMPARE


class Reply(Record):
    """What came back, readable or not. usage and cost cover every attempt that was answered; raw is the judge's last text.

    latency_s: from the first attempt to the end of the last, waits included.
    """

    outcome: Outcome = Field(discriminator="kind")
    raw: str = ""
    usage: Usage = Usage()
    cost_usd: float | None = None
    """Of the attempts whose usage is known; what is kept for others stands in the budget's figures. None: nobody knows the price."""
    latency_s: float = 0.0
    served_model: str = ""
    request_id: str = ""
    attempts: int = 1

    @property
    def is_final(self) -> bool:
        """A decision, a grade, a class or a refusal: asking again would buy the same. Any other failure is asked again on resume."""
        match self.outcome:
            case Decided() | Graded() | Classified():
                return True
            case Undecided():
                return self.outcome.reason == UndecidedReason.REFUSED


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """name: shown in ballots. identity: all that may change an answer, as JSON; it is part of every key.

    concurrency: calls that may be under way at once. is_instant: a free local function, whose calls need no claim in the ledger.
    family: of models it is one of, "" where nobody said. in_waves: an answer takes so long that calls should not wait for one another.
    """

    name: str
    identity: Mapping[str, Any] = field(hash=False)
    concurrency: int
    is_instant: bool = False
    family: str = ""
    in_waves: bool = False


class Backend(Protocol):
    """What the caller relies on: `ask` returns a Reply for every request, however the vendor fails; it raises only what makes
    further calls pointless: JudgeError (credentials, quota, unknown model) or InputError (a verifier that is broken)."""

    @property
    def spec(self) -> BackendSpec: ...

    async def ask(self, request: JudgeRequest) -> Reply: ...

    async def aclose(self) -> None: ...


def open_backend(config: Single | GuardGrader, purse: Purse, ledger: Ledger) -> Backend:
    """The backend of the config of a judge or a guard. Raises InputError if it cannot be opened: no such function, no key in the environment, no price."""
    if isinstance(config, VerifierJudge):
        from judges.verifier import VerifierBackend

        return VerifierBackend(config)
    if isinstance(config, RewardModelJudge):
        from judges.reward_model import RewardModelBackend

        return RewardModelBackend(config)
    from judges.remote import RemoteBackend, identity_of

    dialect = _dialect_of(config)
    identity = identity_of(config, dialect)
    return RemoteBackend(config, dialect, _sender_of(config, dialect, identity, purse, ledger), identity)


def _sender_of(config: RemoteModel, dialect: Dialect, identity: Mapping[str, Any], purse: Purse, ledger: Ledger) -> Sender:
    from judges.batches.store import BatchStore

    store = BatchStore(ledger, identity)
    if config.batch is None and not isinstance(config, VllmRunBatchJudge):
        from judges.direct import DirectSender

        store.refuse_direct_calls(config.model)
        return DirectSender(config, dialect, purse)
    from judges.batches.sender import BatchSender

    vendor: BatchVendor
    match config:
        case VllmRunBatchJudge():
            from judges.batches.run_batch import RunBatch

            vendor = RunBatch(config, ledger.path)
        case AnthropicJudge():
            from judges.batches.anthropic import AnthropicBatches

            vendor = AnthropicBatches(dialect)
        case _:
            from judges.batches.openai import OpenAIBatches

            vendor = OpenAIBatches(dialect)
    return BatchSender(config, dialect, vendor, purse, store)


def _dialect_of(config: RemoteModel) -> Dialect:
    """Only the SDK that is needed is loaded."""
    match config:
        case OpenAIJudge():
            from judges.openai_dialects import ResponsesDialect

            return ResponsesDialect(config)
        case OpenAICompatibleJudge():
            from judges.openai_dialects import ChatDialect

            return ChatDialect(config)
        case AnthropicJudge():
            from judges.anthropic_dialect import MessagesDialect

            return MessagesDialect(config)
        case VllmLabelJudge():
            from judges.vllm_label import LabelDialect

            return LabelDialect(config)
        case GuardGrader():
            from judges.guards.dialect import GuardDialect

            return GuardDialect(config)
        case _:
            raise TypeError(f"a judge of kind {config.kind} has no dialect")
