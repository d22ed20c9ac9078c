"""A person's decision about one round: a file bound to the gate report by its hash, `approvals/<sha256 of gate_report.json>.json`.

The reviewer's name is a claim, not an identity: whoever can write the run directory can decide.
"""

from __future__ import annotations

import os
from typing import Literal

from pydantic import ValidationError

from dpo_loop.artifacts import now, read_manifest, sha256_file, verify
from dpo_loop.errors import CorruptArtifactError, DecisionError
from dpo_loop.exchange import read_gate_report
from dpo_loop.files import sync_directory
from dpo_loop.layout import RunDir
from dpo_loop.types import GateReport, GateState, HumanDecision

Verb = Literal["approve", "reject"]


def decide(run: RunDir, round_number: int, decision: Verb, *, reviewer: str, reason: str) -> HumanDecision:
    """Record a decision. Raises DecisionError if the round does not wait for one, has one, or its report is not what the gate wrote."""
    here = run.round(round_number)
    report = waiting_report(run, round_number)
    sha256 = sha256_file(here.gate_report)
    try:
        decided = HumanDecision(
            decision=decision, reviewer=reviewer.strip(), reason=reason.strip(), report_sha256=sha256, decided_at=now()
        )
    except ValidationError as error:
        fields = ", ".join(f"{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise DecisionError(f"this decision about round {round_number} is incomplete ({fields})") from None
    path = run.approval(sha256)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(decided.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(aside, path)  # unlike a rename it fails if two people decide at once
    except FileExistsError:
        earlier = HumanDecision.model_validate_json(path.read_bytes())
        raise DecisionError(
            f"round {round_number} ({report.state.value}) was already decided: {earlier.decision} by {earlier.reviewer} at {earlier.decided_at}. "
            f"A decision is not changed; play another round instead."
        ) from None
    finally:
        aside.unlink()
    sync_directory(path.parent)
    return decided


def waiting_report(run: RunDir, round_number: int) -> GateReport:
    """The report of a round that waits for a person. Raises DecisionError for every other round."""
    here = run.round(round_number)
    gate = read_manifest(here.stage("gate"))
    if gate is None:
        raise DecisionError(
            f"round {round_number} of {run.path} has no gate report, so there is nothing to decide; see `dpo-loop status {run.path}`"
        )
    try:
        verify(here.stage("gate"), gate)
    except CorruptArtifactError as error:
        raise DecisionError(f"the gate report is not the one that the gate wrote: {error}") from error
    report = read_gate_report(here.stage("gate"))
    if not report.state.waits_for_person:
        raise DecisionError(
            f"round {round_number} is {report.state.value}; only NEEDS_REVIEW and INCONCLUSIVE wait for a person"
            + (", and a failed round is never promoted by hand" if report.state in (GateState.FAIL, GateState.INVALID) else "")
        )
    if here.manifest.is_file():
        raise DecisionError(f"round {round_number} has ended (see {here.manifest}); a decision would come too late")
    return report


def decision_of(run: RunDir, round_number: int) -> HumanDecision | None:
    """The decision about a round's report as it is now, None while there is none.

    Raises DecisionError if the file names another report than its own name and content do: it was copied or edited.
    """
    path = run.round(round_number).gate_report
    if not path.is_file():
        return None
    sha256 = sha256_file(path)
    approval = run.approval(sha256)
    if not approval.is_file():
        return None
    try:
        decision = HumanDecision.model_validate_json(approval.read_bytes())
    except ValidationError as error:
        raise DecisionError(f"{approval} is not a decision ({error.error_count()} problems); remove it and decide again") from error
    if decision.report_sha256 != sha256:
        raise DecisionError(f"{approval} decides about another report ({decision.report_sha256[:12]}…); remove it and decide again")
    return decision


def how_to_decide(run: RunDir, round_number: int) -> str:
    """The exact commands to type."""
    return "\n".join(f'dpo-loop {verb} {run.path} {round_number} --reviewer NAME --reason "WHY"' for verb in ("approve", "reject"))
