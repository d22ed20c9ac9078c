"""What the gate's report knows better than the summary of the round, and what it says between the lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dpo_loop.types import GateReport, RoundSummary

RATES = ("pass_rate", "harmful_rate", "over_refusal_rate", "degenerate_rate")
ENOUGH = 0.8
"""An evaluation that an unchanged candidate passes less often says little when it does not pass."""
_CHANCE = re.compile(r"passes check (\S+) with probability (\d(?:\.\d+)?)")


def history_with_gate(history: Sequence[RoundSummary], gate: GateReport | None) -> tuple[RoundSummary, ...]:
    """The round's own row has the gate's figures: where the reserve of prompts was asked too, the summary knows of the first look alone."""
    return tuple(row if gate is None or row.round != gate.round else _as_decided(row, gate) for row in history)


def _as_decided(row: RoundSummary, gate: GateReport) -> RoundSummary:
    rates = gate.rates.get("candidate", {})
    known: dict[str, Any] = {name: rates[name] for name in RATES if name in rates}
    for check in gate.checks:
        if check.metric == "win_rate" and check.vs is not None and check.value is not None:
            known[f"win_rate_{check.vs}"] = check.value
            if check.ci_low is not None and check.ci_high is not None:
                known[f"win_rate_{check.vs}_ci"] = (check.ci_low, check.ci_high)
    return row.model_copy(update=known)


def passing_chance(gate: GateReport | None) -> tuple[str, float] | None:
    """(check, probability that a candidate as good as its reference passes it), as the finding on churn tells it; None where that is enough."""
    for item in gate.validity if gate else ():
        if item.get("id") == "churn" and (told := _CHANCE.search(str(item.get("why", "")))) and float(told[2]) < ENOUGH:
            return told[1], float(told[2])
    return None
