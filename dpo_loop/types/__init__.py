"""The nouns of the loop. Frozen pydantic records that forbid unknown fields, so what is on disk is what the code says.

A field that may be absent says so with None; "invalid" is an outcome that is counted, never an exception and never a number.
Ids are the first 16 hex digits of a sha256 over content, so the same thing has the same id in every run.
"""

from dpo_loop.types.gate import (
    CapabilityRow,
    CheckResult,
    Comparison,
    Conditions,
    GateReport,
    GateState,
    Grade,
    GradeRow,
    JudgeCanary,
    PolicyName,
    PromptSet,
    Terms,
    Waiver,
)
from dpo_loop.types.judging import (
    Ballot,
    Classified,
    Decided,
    Graded,
    Outcome,
    PreferencePair,
    PromptJudgement,
    SafetyLabel,
    Undecided,
    UndecidedReason,
    Usage,
    Verdict,
    VerdictKind,
)
from dpo_loop.types.policies import PolicyRef
from dpo_loop.types.prompts import Completion, FinishReason, Message, Prompt, Side
from dpo_loop.types.record import Record, canonical_json, content_id
from dpo_loop.types.rounds import Blessing, HumanDecision, RoundManifest, RoundSummary
from dpo_loop.types.stages import StageManifest, StageOutcome, Tally

__all__ = [
    "Ballot",
    "Blessing",
    "CapabilityRow",
    "CheckResult",
    "Classified",
    "Comparison",
    "Completion",
    "Conditions",
    "Decided",
    "FinishReason",
    "GateReport",
    "GateState",
    "Grade",
    "GradeRow",
    "Graded",
    "HumanDecision",
    "JudgeCanary",
    "Message",
    "Outcome",
    "PolicyName",
    "PolicyRef",
    "PreferencePair",
    "Prompt",
    "PromptJudgement",
    "PromptSet",
    "Record",
    "RoundManifest",
    "RoundSummary",
    "SafetyLabel",
    "Side",
    "StageManifest",
    "StageOutcome",
    "Tally",
    "Terms",
    "Undecided",
    "UndecidedReason",
    "Usage",
    "Verdict",
    "VerdictKind",
    "Waiver",
    "canonical_json",
    "content_id",
]
