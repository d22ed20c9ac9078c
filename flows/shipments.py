"""What may go out of a run: the policies that were blessed and the pairs of promoted rounds; the rest only where a person forces it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from dpo_loop.artifacts import now, read_manifest, sha256_file
from dpo_loop.errors import CorruptArtifactError, InputError
from dpo_loop.exchange import read_gate_report
from dpo_loop.layout import RunDir
from dpo_loop.policies import read_blessing
from dpo_loop.types import Blessing, PolicyRef, Record
from flows.card import check_has_policy
from flows.inputs import candidate_of, is_published, pinned_parent
from flows.rounds import RoundState, state_of


class Force(Record):
    """Who lets something unblessed be exported, and why."""

    reviewer: str = Field(min_length=2)
    reason: str = Field(min_length=1)
    at: str


@dataclass(frozen=True, slots=True)
class Shipment:
    """What goes out. blessing None: it was not blessed, and a person forces it. policy: of pairs, the one that answered in the last of their rounds."""

    round: int
    policy: PolicyRef
    blessing: Blessing | None
    rounds_of_pairs: tuple[int, ...] = ()


def force_of(reviewer: str | None, reason: str | None) -> Force:
    """Raises InputError unless both are said."""
    try:
        return Force(reviewer=(reviewer or "").strip(), reason=(reason or "").strip(), at=now())
    except ValidationError as error:
        fields = ", ".join(f"--{item['loc'][0]}: {item['msg']}" for item in error.errors())
        raise InputError(f"--force needs --reviewer NAME and --reason WHY, which are kept with the export ({fields})") from None


def policy_to_ship(run: RunDir, round_number: int | None, force: Force | None) -> Shipment:
    if round_number is not None:
        check_has_policy(run, round_number)
    blessing = _blessing(run, run.current if round_number is None else run.round(round_number).blessing)
    if blessing is not None:
        return Shipment(blessing.round, blessing.policy, blessing)
    if round_number is None:
        raise InputError(f"{run.path} has no blessed policy yet: its round 0 has not ended. Play it, or name a --round.")
    _check_forced(run, round_number, "its policy is", force)
    return Shipment(round_number, candidate_of(run, round_number), None)


def pairs_to_ship(run: RunDir, round_number: int | None, force: Force | None) -> Shipment:
    made = [here.number for here in run.rounds() if is_published(run, here.number, "pair")]
    if round_number is None:
        numbers = [number for number in made if _blessing(run, run.round(number).blessing)]
        if not numbers:
            raise InputError(
                f"no promoted round of {run.path} has pairs; those of other rounds ({_listed(made)}) go out only one by one, with --round and --force"
            )
    elif round_number not in made:
        raise InputError(f"round {round_number} of {run.path} has no pairs; rounds with pairs: {_listed(made)}")
    else:
        numbers = [round_number]
    last = numbers[-1]
    blessing = _blessing(run, run.round(last).blessing)
    if blessing is None:
        _check_forced(run, last, "its pairs are", force)
    return Shipment(last, pinned_parent(run, last).policy, blessing, tuple(numbers))


def _blessing(run: RunDir, path: Path) -> Blessing | None:
    """None where there is none. Raises CorruptArtifactError where the report that it rests on is another one by now."""
    if not path.is_file():
        return None
    blessing = read_blessing(path, run=run.path)
    report = run.round(blessing.round).gate_report
    if blessing.report_sha256 is not None and (not report.is_file() or sha256_file(report) != blessing.report_sha256):
        raise CorruptArtifactError(
            f"{path} blesses the policy of round {blessing.round} by a gate report that {report} no longer is: one of the two was changed or "
            "removed. Put it back from a copy; --force does not help here."
        )
    graded = read_gate_report(report.parent).candidate if blessing.report_sha256 is not None else None
    if graded is not None and graded.key != blessing.policy.key:
        raise CorruptArtifactError(
            f"{path} blesses policy {blessing.policy.key}, but the gate report that it names graded {graded.key}. Put it back from a copy; --force "
            "does not help here."
        )
    return blessing


def _check_forced(run: RunDir, number: int, subject: str, force: Force | None) -> None:
    if force is not None:
        return
    blessed = [here.number for here in run.rounds() if here.blessing.is_file()]
    decide = f" decide it (`dpo-loop approve {run.path} {number}`);" if state_of(run, number) is RoundState.WAITING else ""
    raise InputError(
        f"round {number} of {run.path} was not promoted ({_why_not(run, number)}), so {subject} not exported. Ways out: export a promoted round "
        f"({_listed(blessed)});{decide} or --force --reviewer NAME --reason WHY, which is kept in the export, its card and {run.exports}."
    )


def _why_not(run: RunDir, number: int) -> str:
    gate = run.round(number).stage("gate")
    if read_manifest(gate) is None:
        return "its gate has not decided"
    report = read_gate_report(gate)
    return f"{report.state.value}: {report.reasons[0]}" if report.reasons else report.state.value


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
