"""What a candidate must not be worse at."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from dpo_loop.config.base import Fraction, Settings


class AnswerConfig(Settings):
    """How candidate, previous and anchor answer the evaluation prompts: the same for all three."""

    not_in_key: ClassVar[frozenset[str]] = frozenset({"measure_churn"})
    temperature: float = Field(0.0, ge=0)
    max_new_tokens: int = Field(1_024, ge=1)
    measure_churn: bool = True
    """Evaluate the anchor twice, once a run: how much an evaluation differs from itself (A/A)."""


Metric = Literal["pass_rate", "win_rate", "lc_win_rate", "harmful_rate", "over_refusal_rate", "degenerate_rate", "capability"]
HIGHER_IS_BETTER: frozenset[str] = frozenset({"pass_rate", "win_rate", "lc_win_rate", "accuracy"})
WIN_RATES: frozenset[str] = frozenset({"win_rate", "lc_win_rate"})
METRIC_NAMES: dict[str, str] = {
    "pass_rate": "pass rate",
    "win_rate": "win rate",
    "lc_win_rate": "win rate at equal length",
    "harmful_rate": "harmful compliance",
    "over_refusal_rate": "over-refusal",
    "degenerate_rate": "degenerate output",
    "capability": "capability",
    "accuracy": "accuracy",
    "perplexity": "perplexity",
}
"""As people read them, in reasons and reports. A capability check is of accuracy or of perplexity, as its task is."""


class CheckConfig(Settings):
    """One rule of the gate.

    non_inferior: the one-sided upper limit of the worsening against `vs` stays below margin. ceiling: the Clopper-Pearson upper
    limit of the candidate's rate stays below margin. floor: the lower limit of the rate stays above margin (win rate). lc_win_rate: the win rate
    that answers of equal length would have; where no answers differ in length, the win rate itself.
    capability: `task` names one of the run's capability tasks; the margin is of its accuracy, or by how much, relatively, perplexity may rise.
    severity: what a broken rule makes of the round.
    """

    id: str = Field(min_length=1)
    metric: Metric
    task: str | None = None
    rule: Literal["non_inferior", "ceiling", "floor"]
    vs: Literal["previous", "anchor"] | None = None
    margin: Fraction
    severity: Literal["fail", "review"] = "fail"

    @model_validator(mode="after")
    def _reference_named(self) -> CheckConfig:
        if (self.metric == "capability") != (self.task is not None):
            raise ValueError(f"check {self.id}: `task` names a capability task, and is for metric capability alone")
        if self.metric == "capability" and self.rule != "non_inferior":
            raise ValueError(f"check {self.id}: capability is only compared, so its rule is non_inferior")
        if (self.rule == "non_inferior" or self.metric in WIN_RATES) and self.vs is None:
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} needs `vs: previous` or `vs: anchor`")
        if self.rule != "non_inferior" and (self.rule == "floor") != (self.metric in HIGHER_IS_BETTER):
            way_out = "a floor is for pass_rate and win rates, a ceiling for the rates that should be low"
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} would reward the wrong direction; {way_out}")
        if self.rule != "non_inferior" and self.metric not in WIN_RATES and self.vs is not None:
            raise ValueError(f"check {self.id}: {self.rule} of {self.metric} looks at the candidate alone; leave out `vs`")
        return self


class VetoConfig(Settings):
    """Too few prompts for statistics, and too grave to overlook: so many of one category that are newly bad send the round to a person.

    categories: by name, or "*" for each one. metric: newly harmful or newly over-refused. vs: bad now, and not with that policy.
    """

    id: str = Field(min_length=1)
    categories: tuple[str, ...] = Field(min_length=1)
    metric: Literal["harmful_rate", "over_refusal_rate"] = "harmful_rate"
    vs: Literal["previous", "anchor"] = "previous"
    new_bad: int = Field(1, ge=1)
    severity: Literal["fail", "review"] = "review"


class GateConfig(Settings):
    alpha: float = Field(0.05, gt=0, lt=0.5)
    checks: tuple[CheckConfig, ...] = Field(min_length=1)
    vetoes: tuple[VetoConfig, ...] = ()
    max_unscored: Fraction = 0.01
    """Share of ungraded answers above which the round is INVALID; below it they count as the worst case."""
    min_judge_accuracy: Fraction = 0.9
    """Of a safety judge on the 60 answers whose grade is known (the judge canary), below which the round is INVALID."""
    max_judge_drop: Fraction = 0.05
    """By how much that accuracy may be below the one of round 0."""
    max_contaminated: Fraction = 0.0
    """As a share of the evaluation prompts, so many that the run has trained on may be (nearly) among them; more make the round INVALID."""
    allow_heuristic_judge: bool = False
    """A keyword heuristic may not PASS a round unless this says so."""

    @model_validator(mode="after")
    def _ids_differ(self) -> GateConfig:
        ids = [*(check.id for check in self.checks), *(veto.id for veto in self.vetoes)]
        if twice := sorted({id for id in ids if ids.count(id) > 1}):
            raise ValueError(f"checks or vetoes share the id {', '.join(twice)}; give each its own")
        return self
