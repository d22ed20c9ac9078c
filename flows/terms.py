"""What people settle about the gate between rounds: which round's policy is the anchor, and which checks may be broken for a while.

Both are written down with a name and a reason, hold from the next round on that begins, and are pinned there (`terms.json`): what a round was judged
by does not change under it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from dpo_loop.artifacts import now, sha256_file
from dpo_loop.errors import DecisionError
from dpo_loop.evaluation.decision import harm_of
from dpo_loop.exchange import read_gate_report
from dpo_loop.files import read_json, read_jsonl, write_json, write_text
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState, Record, RoundManifest, Terms, Waiver


class AnchorMove(Record):
    """A line of `anchors.jsonl`, of which the last one holds. before: the round of the anchor until then."""

    round: int
    before: int
    reviewer: str = Field(min_length=1)
    reason: str = Field(min_length=1)
    moved_at: str


def pin_terms(run: RunDir, round_number: int) -> None:
    """For a round that begins. Does nothing where they are pinned."""
    path = run.round(round_number).terms
    if not path.is_file():
        anchor = anchor_round(run)
        holding = tuple(
            waiver
            for waiver in waivers(run)
            if waiver.expires_round >= round_number and (waiver.vs != "anchor" or waiver.anchor_round == anchor)
        )
        write_json(path, Terms(anchor_round=anchor, waivers=holding))


def terms_of(run: RunDir, round_number: int) -> Terms:
    """As pinned; the usual ones for a round of before terms were pinned."""
    path = run.round(round_number).terms
    return read_json(path, Terms) if path.is_file() else Terms()


def anchor_round(run: RunDir) -> int:
    made = moves(run)
    return made[-1].round if made else 0


def moves(run: RunDir) -> tuple[AnchorMove, ...]:
    return tuple(read_jsonl(run.anchors, AnchorMove)) if run.anchors.is_file() else ()


def waivers(run: RunDir) -> tuple[Waiver, ...]:
    return tuple(read_jsonl(run.waivers, Waiver)) if run.waivers.is_file() else ()


def rebase(run: RunDir, round_number: int, *, reviewer: str, reason: str) -> AnchorMove:
    """Make the policy of a promoted round the anchor of the rounds to come. Raises DecisionError for a round that was not promoted."""
    path = run.round(round_number).manifest
    if not path.is_file() or not read_json(path, RoundManifest).promoted:
        raise DecisionError(
            f"round {round_number} of {run.path} was not promoted, and only a promoted policy can be the anchor; see `dpo-loop show {run.path}`"
        )
    before = anchor_round(run)
    if before == round_number:
        raise DecisionError(f"the policy of round {round_number} is the anchor already; nothing was changed")
    _need_words(reviewer, reason)
    move = AnchorMove(round=round_number, before=before, reviewer=reviewer.strip(), reason=reason.strip(), moved_at=now())
    _append(run.anchors, (*moves(run), move))
    return move


def waive(run: RunDir, round_number: int, check_id: str, *, num_rounds: int, reviewer: str, reason: str) -> Waiver:
    """Let a check that was broken in `round_number` be broken in the `num_rounds` rounds after it too.

    Raises DecisionError for a check that is not broken there, or a report that says nothing about the candidate.
    """
    here = run.round(round_number)
    if not here.gate_report.is_file():
        raise DecisionError(f"round {round_number} of {run.path} has no gate report, so there is nothing to waive")
    report = read_gate_report(here.stage("gate"))
    found = {check.id: check for check in report.checks}
    check = found.get(check_id)
    if check is None:
        known = ", ".join(found) or "none, since the round is INVALID"
        raise DecisionError(f"round {round_number} has no check {check_id}; it has {known}")
    if check.state in (GateState.PASS, GateState.INVALID):
        raise DecisionError(
            f"check {check_id} of round {round_number} is {check.state.value}: only a check that is broken or undecided can be waived"
        )
    _need_words(reviewer, reason)
    expires = round_number + num_rounds
    if expires < (following := len(run.rounds())):
        raise DecisionError(
            f"this waiver would end with round {expires}, and the next round that begins is {following}; give more --rounds"
        )
    waiver = Waiver(
        check_id=check_id,
        state=check.state.value,
        harm=harm_of(check),
        vs=check.vs,
        anchor_round=report.anchor_round,
        reviewer=reviewer.strip(),
        reason=reason.strip(),
        report_sha256=sha256_file(here.gate_report),
        expires_round=expires,
        waived_at=now(),
    )
    _append(run.waivers, (*waivers(run), waiver))
    return waiver


def _append(path: Path, lines: Sequence[Record]) -> None:
    """Written anew as a whole, so that a crash leaves all of the old lines or all of the new."""
    write_text(path, "".join(line.model_dump_json() + "\n" for line in lines))


def _need_words(reviewer: str, reason: str) -> None:
    if not reviewer.strip() or not reason.strip():
        raise DecisionError("a reviewer and a reason are needed, and neither may be empty")
