"""The first thing a reader sees: what was decided, why, and what to type now."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field

from dpo_loop.types import CheckResult, GateReport, GateState

NEXT_STEP = {
    GateState.PASS: "The candidate generates the next round. There is nothing to do. All figures of the round:",
    GateState.FAIL: "The candidate is kept aside and never promoted; the previous policy generates the next round. All figures of the round:",
    GateState.INVALID: "The round says nothing about a candidate. The previous policy stays; mend the cause and play the round again. What happened:",
    GateState.NEEDS_REVIEW: "A person has to decide. Until then the previous policy stays. Read the samples below, then run one of:",
    GateState.INCONCLUSIVE: "There is too little evidence to decide, so a person has to. Until then the previous policy stays. Run one of:",
}
NEXT_STEP_OF_ROWS = {
    GateState.PASS: "The candidate holds every check on these rows.",
    GateState.FAIL: "The candidate is worse than the checks allow on these rows.",
    GateState.INVALID: "These rows say nothing about the candidate. Mend the cause and look again.",
    GateState.NEEDS_REVIEW: "A person has to decide. Read the samples below.",
    GateState.INCONCLUSIVE: "There is too little evidence to decide on these rows. More prompts help.",
}
"""Where there are rows of somebody's and no run that could go on."""


@dataclass(frozen=True, slots=True)
class Banner:
    """reason: one sentence; more: the others. commands: to copy. waived: checks that a person let be broken."""

    state: str
    kind: str
    reason: str
    next_step: str
    commands: list[str] = field(default_factory=list)
    more: tuple[str, ...] = ()
    waived: tuple[CheckResult, ...] = ()


def banner_of(gate: GateReport | None, *, run_dir: str | None, round_number: int) -> Banner:
    """run_dir None: of rows that belong to no run."""
    if gate is None:
        return _without_gate(round_number)
    first, *more = gate.reasons or ("no reason was recorded",)
    return Banner(
        state=gate.state.value.replace("_", " "),
        kind=gate.state.value.lower(),
        reason=first[:1].upper() + first[1:],
        next_step=(NEXT_STEP_OF_ROWS if run_dir is None else NEXT_STEP)[gate.state],
        commands=[] if run_dir is None else _commands(gate.state, shlex.quote(run_dir), round_number),
        more=tuple(more),
        waived=tuple(check for check in gate.checks if check.waived_by is not None),
    )


def _without_gate(round_number: int) -> Banner:
    if round_number == 0:
        reason = "The start policy, answered and graded: the anchor that every later round is compared with."
        return Banner("START", "start", reason, "There is nothing to do.")
    return Banner("NO GATE", "invalid", "The round ended before its gate decided anything.", "The previous policy stays.")


def _commands(state: GateState, run: str, round_number: int) -> list[str]:
    if state.waits_for_person:
        return [f'dpo-loop {verb} {run} {round_number} --reviewer "your name" --reason "why"' for verb in ("approve", "reject")]
    return [f"dpo-loop show {run} {round_number}"]
