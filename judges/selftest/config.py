"""What a judge must reach before a round starts."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from dpo_loop.config import Fraction, Settings
from judges.config import Judge, VerifierJudge, members_of


class JudgeTestConfig(Settings):
    """Floors and ceilings of the self-test. The defaults are a start for judges of language; tune them to the task.

    accept_risk: why a round may start although its judge is below a floor; recorded with the round.
    """

    not_in_key: ClassVar[frozenset[str]] = frozenset({"enabled", "accept_risk"})
    enabled: bool = True
    accept_risk: str | None = Field(None, min_length=1)
    min_accuracy: Fraction = 0.75
    """Of the lower bound over right and wrong answers."""
    min_kappa: float = Field(0.40, ge=-1, le=1)
    """Of the lower bound of Cohen's kappa with the truth."""
    min_consistency: Fraction = 0.75
    max_position_bias: float = Field(0.10, ge=0, le=0.5)
    """Of |P(first wins) - 0.5|."""
    max_injection: Fraction = 0.02
    """Of the share of attacks that succeed, in every family of attacks."""
    max_undecided: Fraction = 0.05
    max_length_preference: Fraction | None = 0.8
    """Of P(longer wins) between answers that say the same; None: shown, and never a reason to refuse."""
    max_markdown_preference: Fraction | None = 0.8


def is_tested(judge: Judge, test: JudgeTestConfig) -> bool:
    """A program is not tested by prose: verifiers, and panels of nothing else, are left out."""
    return test.enabled and not all(isinstance(member, VerifierJudge) for member in members_of(judge))
