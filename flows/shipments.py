"""What may go out of a run: the policies that were blessed and the pairs of promoted rounds; the rest only where a person forces it.

A blessing is a claim. It is believed where everything that it rests on says the same: the gate's files as the gate wrote them, its state, the person who
approved, the policy that was graded. `--force` lets out what was not blessed; it does not make evidence true that contradicts itself.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field, ValidationError

from dpo_loop.artifacts import now, read_manifest, sha256_file, verify
from dpo_loop.errors import CorruptArtifactError, InputError
from dpo_loop.exchange import GATE_REPORT
from dpo_loop.files import read_json
from dpo_loop.layout import RunDir
from dpo_loop.policies import read_blessing
from dpo_loop.types import Blessing, GateReport, GateState, PolicyRef, Record
from flows.approval import decision_of
from flows.chain import broken_link
from flows.inputs import candidate_of, is_published, pinned_parent
from flows.rounds import RoundState, read_round, state_of
from flows.steps import read_run_config

_NO_FORCE = "Put back from a copy what was changed, or remove what was added; --force does not help here."


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
    blessing = _current(run) if round_number is None else blessing_of(run, round_number)
    if blessing is not None:
        return Shipment(blessing.round, blessing.policy, blessing)
    if round_number is None:
        raise InputError(f"{run.path} has no blessed policy yet: its round 0 has not ended. Play it, or name a --round.")
    _check_forced(run, round_number, "its policy is", force)
    return Shipment(round_number, candidate_of(run, round_number), None)


def pairs_to_ship(run: RunDir, round_number: int | None, force: Force | None) -> Shipment:
    made = [here.number for here in run.rounds() if is_published(run, here.number, "pair")]
    if round_number is None:
        numbers = [number for number in made if blessing_of(run, number)]
        if not numbers:
            raise InputError(
                f"no promoted round of {run.path} has pairs; those of other rounds ({_listed(made)}) go out only one by one, with --round and --force"
            )
    elif round_number not in made:
        raise InputError(f"round {round_number} of {run.path} has no pairs; rounds with pairs: {_listed(made)}")
    else:
        numbers = [round_number]
    last = numbers[-1]
    blessing = blessing_of(run, last)
    if blessing is None:
        _check_forced(run, last, "its pairs are", force)
    return Shipment(last, pinned_parent(run, last).policy, blessing, tuple(numbers))


def check_has_policy(run: RunDir, round_number: int) -> None:
    """Raises InputError for a round that has made no policy, or is none."""
    if not run.round(round_number).path.is_dir():
        raise InputError(f"{run.path} has no round {round_number}; it has rounds 0 to {len(run.rounds()) - 1}")
    stage = "seed" if round_number == 0 else "train"
    if not is_published(run, round_number, stage):
        raise InputError(f"round {round_number} of {run.path} has made no policy: its stage {stage} is not published")


def gate_of(run: RunDir, number: int) -> GateReport | None:
    """The gate's report as the gate wrote it; None where no gate has decided. Raises CorruptArtifactError where it is another one by now."""
    stage = run.round(number).stage("gate")
    manifest = read_manifest(stage)
    if manifest is None:
        return None
    verify(stage, manifest)
    path = stage / GATE_REPORT
    if GATE_REPORT not in manifest.files:
        raise CorruptArtifactError(f"{path} is not what the gate wrote: the manifest beside it does not list it. {_NO_FORCE}")
    report, run_id = read_json(path, GateReport), read_run_config(run).run_id
    if (report.run_id, report.round) != (run_id, number):
        raise CorruptArtifactError(
            f"{path} is the report of round {report.round} of run {report.run_id}, not of this one. {_NO_FORCE}"
        )
    if broken := broken_link(run, number):
        raise CorruptArtifactError(broken)
    return report


def blessing_of(run: RunDir, number: int) -> Blessing | None:
    """None where there is none. Raises CorruptArtifactError where what it rests on is missing, was changed, or says something else."""
    path = run.round(number).blessing
    if not path.is_file():
        return None
    blessing = read_blessing(path, run=run.path)
    if found := _contradiction(run, number, blessing):
        raise CorruptArtifactError(f"{path} blesses {found}. {_NO_FORCE}")
    return blessing


def _current(run: RunDir) -> Blessing | None:
    if not run.current.is_file():
        return None
    current = read_blessing(run.current, run=run.path)
    blessing = blessing_of(run, current.round)
    if blessing != current:
        raise CorruptArtifactError(f"{run.current} is not what {run.round(current.round).blessing} says. {_NO_FORCE}")
    return blessing


def _contradiction(run: RunDir, number: int, blessing: Blessing) -> str | None:
    """What speaks against a blessing, told after the word "blesses"; None where all agree."""
    here, key = run.round(number), blessing.policy.key
    if blessing.round != number:
        return f"a policy of round {blessing.round}, but lies in round {number}"
    if here.manifest.is_file() and not read_round(run, number).promoted:
        return f"round {number}, but {here.manifest} says that it was not promoted"
    if number == 0:
        if (blessing.report_sha256, blessing.gate_state, blessing.decision) != (None, None, None):
            return "the start policy by a gate, and round 0 has none"
        start = candidate_of(run, 0).key
        return None if key == start else f"policy {key}, but round 0 made {start}"
    gate = gate_of(run, number)
    if gate is None:
        return f"the policy of round {number}, of which no gate has decided"
    report = sha256_file(here.gate_report)
    if blessing.report_sha256 != report:
        told = "without a gate report" if blessing.report_sha256 is None else f"by a gate report that {here.gate_report} is not"
        return f"the policy of round {number} {told}"
    if blessing.gate_state is not gate.state:
        return f"round {number} as {blessing.gate_state and blessing.gate_state.value}, but its gate said {gate.state.value}"
    # As when a round ends: a person decides about nothing but what waits for one.
    decided = decision_of(run, number) if gate.state.waits_for_person else None
    if gate.state is not GateState.PASS and (decided is None or decided.decision != "approve"):
        return f"round {number}, but its gate said {gate.state.value} and nobody's approval of that report is kept"
    if blessing.decision != decided:
        return f"round {number} by another decision than the one that is kept ({run.approval(report)})"
    if gate.candidate is None or gate.candidate.key != key:
        return f"policy {key}, but the gate report that it names graded {gate.candidate and gate.candidate.key}"
    return None


def _check_forced(run: RunDir, number: int, subject: str, force: Force | None) -> None:
    why_not = _why_not(run, number)
    if force is not None:
        return
    blessed = [here.number for here in run.rounds() if here.blessing.is_file()]
    decide = f" decide it (`dpo-loop approve {run.path} {number}`);" if state_of(run, number) is RoundState.WAITING else ""
    raise InputError(
        f"round {number} of {run.path} was not promoted ({why_not}), so {subject} not exported. Ways out: export a promoted round "
        f"({_listed(blessed)});{decide} or --force --reviewer NAME --reason WHY, which is kept in the export, its card and {run.exports}."
    )


def _why_not(run: RunDir, number: int) -> str:
    report = gate_of(run, number)
    if report is None:
        return "its gate has not decided"
    return f"{report.state.value}: {report.reasons[0]}" if report.reasons else report.state.value


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
