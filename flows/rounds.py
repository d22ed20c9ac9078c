"""What a round is and what its end decides: pure decisions over files. No orchestrator here, and nothing that cannot be done again.

A round begins by pinning the blessing in `current.json` as its parent, and ends with `round.json`. Between them only stages are published.
Promotion is the blessing file, then one atomic write of `current.json`; whatever crash comes between, the same call heals it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from dpo_loop.artifacts import now, read_manifest, sha256_file, verify
from dpo_loop.errors import CorruptArtifactError, InputError, StaleArtifactError
from dpo_loop.exchange import read_gate_report
from dpo_loop.files import hold, read_json, write_json, write_text
from dpo_loop.layout import STAGES, STAGES_OF_ROUND_0, RunDir
from dpo_loop.policies import POLICY_FILE, read_blessing, write_blessing
from dpo_loop.types import Blessing, GateState, HumanDecision, PolicyRef, RoundManifest, RoundSummary
from flows.approval import decision_of
from flows.chain import broken_link
from flows.config import RunConfig, changed_keys
from flows.inputs import candidate_of, is_published
from flows.steps import read_run_config, stages_of
from flows.summary import summaries, summarise
from flows.terms import pin_terms

_held: set[Path] = set()


@contextmanager
def lease(run: RunDir, *, wait_s: float = 5.0) -> Iterator[None]:
    """One process plays a run. Taking it again within the process is free. Raises BusyError if another one holds it.

    wait_s: a process that was just killed needs a moment to let go.
    """
    path = run.lease.absolute()
    if path in _held:
        yield
        return
    with hold(path, wait_s=wait_s, what=f"run {run.path}"):
        _held.add(path)
        try:
            yield
        finally:
            _held.discard(path)


def adopt_config(run: RunDir, config: RunConfig) -> None:
    """Record the config of a run, or check it against the recorded one. Raises StaleArtifactError naming the keys that differ.

    Keys that do not change what is made (how many rounds, time-outs, retries) may change and are recorded anew; every key may, as long as
    no stage is published.
    """
    if run.config.is_file() and _has_published(run):
        changes = changed_keys(read_run_config(run), config)
        if changes:
            listed = "\n".join(f"  - {change}" for change in changes)
            raise StaleArtifactError(
                f"{run.path} was made with another configuration; what differs (recorded → now):\n{listed}\nNothing was started or "
                "overwritten. Ways out: restore these keys, or choose another run_dir (--set run_dir=…)."
            )
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.config, config)


def _has_published(run: RunDir) -> bool:
    names = dict.fromkeys((*STAGES_OF_ROUND_0, *STAGES))
    return any(is_published(run, here.number, name) for here in run.rounds() for name in names)


# -------------------------------------------------------------------------------------------------------- how far it is


class RoundState(StrEnum):
    NEW = "new"
    PLAYING = "playing"
    WAITING = "waiting"
    """Everything is made; a person decides."""
    FINISHED = "finished"


def state_of(run: RunDir, round_number: int) -> RoundState:
    here = run.round(round_number)
    if here.manifest.is_file():
        return RoundState.FINISHED
    if not here.path.is_dir():
        return RoundState.NEW
    if is_made(run, round_number):
        state = read_gate_report(here.stage("gate")).state
        if state.waits_for_person and decision_of(run, round_number) is None:
            return RoundState.WAITING
    return RoundState.PLAYING


def is_made(run: RunDir, round_number: int) -> bool:
    """Whether all stages of a round after round 0 are done, so that only its end is left."""
    return is_published(run, round_number, "gate") and is_published(run, round_number, "report")


def next_round(run: RunDir) -> int:
    """The first round that has not ended."""
    number = 0
    while state_of(run, number) is RoundState.FINISHED:
        number += 1
    return number


class Stop(StrEnum):
    """Why a loop ends."""

    ROUNDS_PLAYED = "all rounds are played"
    WAITING = "a round waits for a person"
    FAILURES = (
        "too many rounds in a row without promotion (raise max_consecutive_failures, or play one more with `dpo-loop round CONFIG`)"
    )
    PROMPTS_USED_UP = (
        "the prompts are used up (set prompts.reuse to `cycle`, or begin a run with more prompts or a higher prompts.num_buckets)"
    )

    @property
    def wants_change(self) -> bool:
        """Whether rounds that were asked for were not played."""
        return self in (Stop.FAILURES, Stop.PROMPTS_USED_UP)


def stop_reason(run: RunDir, config: RunConfig) -> Stop | None:
    """Whether the loop ends here, None if there is a round to play."""
    number = next_round(run)
    match state_of(run, number):
        case RoundState.WAITING:
            return None if config.review_timeout_s else Stop.WAITING
        case RoundState.PLAYING:
            return None
    if number > config.rounds:
        return Stop.ROUNDS_PLAYED
    if number > config.max_consecutive_failures:
        last = [read_round(run, n).promoted for n in range(number - config.max_consecutive_failures, number)]
        if not any(last):
            return Stop.FAILURES
    if config.prompts.reuse == "fresh" and number > config.prompts.num_buckets:
        return Stop.PROMPTS_USED_UP
    return None


# --------------------------------------------------------------------------------------------------- beginning and end


def begin_round(run: RunDir, round_number: int) -> None:
    """Make the round's directory and pin its parent, the anchor and the waivers. Does nothing to a round that has begun.

    Raises InputError if the round before it has not ended.
    """
    here = run.round(round_number)
    if round_number > 0:
        if state_of(run, round_number - 1) is not RoundState.FINISHED:
            raise InputError(f"round {round_number} of {run.path} cannot begin: round {round_number - 1} has not ended")
        current_policy(run)  # readable, before anything is pinned to it
    here.path.mkdir(parents=True, exist_ok=True)
    if round_number > 0 and not here.parent.is_file():
        pin_terms(run, round_number)
        write_text(here.parent, run.current.read_text(encoding="utf-8"))


def current_policy(run: RunDir) -> Blessing:
    if not run.current.is_file():
        raise CorruptArtifactError(
            f"{run.current} is missing, though rounds have ended. Copy the blessing.json of the last promoted round there."
        )
    return read_blessing(run.current, run=run.path)


def finish_round(run: RunDir, round_number: int, *, review_timed_out: bool = False) -> RoundManifest:
    """Promote or keep, then write `round.json`. Idempotent.

    Raises InputError if the round waits for a person (unless it was waited for long enough), CorruptArtifactError if what would be promoted
    is not what was graded.
    """
    here = run.round(round_number)
    if here.manifest.is_file():
        return read_round(run, round_number)
    gate, decision = _verdict(run, round_number)
    if gate is not None and gate.waits_for_person and decision is None and not review_timed_out:
        raise InputError(f"round {round_number} of {run.path} waits for a person")
    promoted = gate in (None, GateState.PASS) or (decision is not None and decision.decision == "approve")
    if promoted:
        _promote(run, round_number, gate, decision)
    summary = summarise(run, round_number, promoted=promoted)
    manifest = RoundManifest(
        round=round_number,
        parent=_stored(here.parent),
        candidate=_stored(here.stage("seed" if round_number == 0 else "train") / POLICY_FILE),
        gate=gate,
        promoted=promoted,
        policy=read_json(run.current, Blessing).policy,
        stage_keys={name: made.key for name in _stages(run, round_number) if (made := read_manifest(here.stage(name)))},
        seconds=summary.seconds,
        summary=summary.model_dump(mode="json"),
        decision=decision,
        finished_at=now(),
    )
    write_json(here.manifest, manifest)
    return manifest


def _verdict(run: RunDir, round_number: int) -> tuple[GateState | None, HumanDecision | None]:
    if round_number == 0:
        return None, None
    state = read_gate_report(run.round(round_number).stage("gate")).state
    return state, decision_of(run, round_number) if state.waits_for_person else None


def _promote(run: RunDir, round_number: int, gate: GateState | None, decision: HumanDecision | None) -> None:
    here = run.round(round_number)
    for name in ("seed",) if round_number == 0 else ("train", "gate"):  # files may have changed while a person thought
        manifest = read_manifest(here.stage(name))
        if manifest is None:
            raise CorruptArtifactError(f"round {round_number} cannot be promoted: {here.stage(name)} is not published")
        verify(here.stage(name), manifest)
    candidate = candidate_of(run, round_number)
    if round_number > 0:
        judged = read_gate_report(here.stage("gate")).candidate
        if judged is None or judged.key != candidate.key:
            raise CorruptArtifactError(
                f"round {round_number} cannot be promoted: its gate judged another candidate than the one in {here.stage('train')}. Remove that folder "
                "and the stages after it, and run the same command again: they are made anew."
            )
        if (broken := broken_link(run, round_number)) is not None:
            raise CorruptArtifactError(f"round {round_number} cannot be promoted: {broken}")
    if not here.blessing.is_file():
        blessing = Blessing(
            round=round_number,
            policy=candidate,
            gate_state=gate,
            report_sha256=sha256_file(here.gate_report) if gate is not None else None,
            decision=decision,
            blessed_at=now(),
        )
        write_blessing(here.blessing, blessing, run=run.path)
    write_text(run.current, here.blessing.read_text(encoding="utf-8"))


def _stored(path: Path) -> PolicyRef | None:
    """A policy as it is written, with paths relative to the run; of a blessing, the policy it blesses."""
    if not path.is_file():
        return None
    if path.name == POLICY_FILE:
        return read_json(path, PolicyRef)
    return read_json(path, Blessing).policy


def _stages(run: RunDir, round_number: int) -> tuple[str, ...]:
    return stages_of(read_run_config(run), round_number)


# ------------------------------------------------------------------------------------------------------- after its end


def read_round(run: RunDir, round_number: int) -> RoundManifest:
    path = run.round(round_number).manifest
    if not path.is_file():
        raise InputError(f"round {round_number} of {run.path} has not ended")
    return read_json(path, RoundManifest)


def verify_rounds(run: RunDir, numbers: Iterable[int]) -> int:
    """Compare every file of every published stage with its hash; returns how many. Raises CorruptArtifactError at the first difference."""
    num_files = 0
    for number in numbers:
        for name in _stages(run, number):
            directory = run.round(number).stage(name)
            if manifest := read_manifest(directory):
                num_files += len(verify(directory, manifest).files)
    return num_files


def exit_code(run: RunDir, config: RunConfig) -> int:
    """Of a loop: 0 when all rounds are played and at least one was promoted; else that of the last round's gate."""
    played = [row for row in summaries(run) if row.round > 0 and row.gate is not None]
    if not played:
        return 0
    if len(played) >= config.rounds and any(row.promoted for row in played) and stop_reason(run, config) is Stop.ROUNDS_PLAYED:
        return 0
    return round_exit_code(run, played[-1])


def round_exit_code(run: RunDir, row: RoundSummary) -> int:
    """Of one round: 0 when it was promoted, by the gate or by a person; 10 when a person rejected it."""
    if row.gate is None or row.promoted:
        return 0
    if row.gate.waits_for_person and (decision := decision_of(run, row.round)) and decision.decision == "reject":
        return GateState.FAIL.exit_code
    return row.gate.exit_code
