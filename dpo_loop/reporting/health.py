"""Of pairs and judge: where prompts went, whether the judge leans to one side, what it cost. Read from what the stages counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_loop.types import StageOutcome


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What a stage counted: shown as it was recorded in its manifest. key: which inputs and version of the stage made it."""

    name: str
    outcome: StageOutcome
    key: str = ""
    version: int = 0
    finished_at: str = ""


@dataclass(frozen=True, slots=True)
class Sign:
    """A figure that warns where it is outside low..high. note: what it means."""

    name: str
    value: float
    note: str
    is_usual: bool


@dataclass(frozen=True, slots=True)
class Bill:
    """What the judge of a stage was asked. cost_usd None: nobody knows the price."""

    stage: str
    judge: str
    num_asked: int
    num_known: int
    input_tokens: int
    output_tokens: int
    cost_usd: float | None
    undecided: str


# (stage, metric, name, note, low, high): beyond low..high it is worth a look. The bounds are rules of thumb, not tests.
_SIGNS = (
    ("judging", "consistency", "both orders agree", "of pairs decided in both orders; below 80 % the judge guesses", 0.8, 1.0),
    ("judging", "first_position_win_rate", "first position wins", "50 % is unbiased", 0.4, 0.6),
    ("judging", "longer_win_rate", "longer answer wins", "50 % is unbiased; a judge that likes length makes every round longer", 0.35, 0.65),
    ("judging", "tie_rate", "ties", "of pairs decided in both orders", 0.0, 0.4),
    ("judging", "yield", "verdicts with a winner", "of all prompts", 0.2, 1.0),
    ("pairing", "chosen_longer_rate", "chosen answer is longer", "of pairs; 50 % is unbiased", 0.35, 0.65),
)  # fmt: skip


def signs_of(stages: Sequence[StageFigures]) -> list[Sign]:
    metrics = {stage.name: stage.outcome.metrics for stage in stages}
    found = []
    for stage, metric, name, note, low, high in _SIGNS:
        value = metrics.get(stage, {}).get(metric)
        if isinstance(value, int | float):
            found.append(Sign(name, float(value), note, low <= value <= high))
    return found


def agreements_of(stages: Sequence[StageFigures]) -> list[tuple[str, Mapping[str, Any]]]:
    """(two judges of a panel, how often they say the same), where there is a panel."""
    return [item for stage in stages for item in (stage.outcome.metrics.get("agreement") or {}).items()]


def bills_of(stages: Sequence[StageFigures]) -> list[Bill]:
    return [_bill(stage.name, figures) for stage in stages if "calls_asked" in (figures := stage.outcome.metrics)]


def total_cost(bills: Sequence[Bill]) -> float | None:
    costs = [bill.cost_usd for bill in bills]
    return None if not costs or None in costs else sum(cost for cost in costs if cost is not None)


def _bill(stage: str, figures: Mapping[str, Any]) -> Bill:
    undecided = figures.get("undecided_calls") or {}
    return Bill(
        stage=stage,
        judge=str(figures.get("judge", "")),
        num_asked=figures["calls_asked"],
        num_known=figures.get("calls_from_ledger", 0),
        input_tokens=figures.get("input_tokens", 0),
        output_tokens=figures.get("output_tokens", 0),
        cost_usd=figures.get("cost_usd"),
        undecided=", ".join(f"{reason.replace('_', ' ')} {num}" for reason, num in undecided.items()),
    )
