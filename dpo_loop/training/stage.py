"""The `train` stage: an adapter trained on a round's pairs, from the promoted one to a new immutable one."""

from __future__ import annotations

from pathlib import Path

from dpo_loop.artifacts import Stage, scratch
from dpo_loop.config import TrainingConfig
from dpo_loop.errors import CorruptArtifactError, NoPairsError
from dpo_loop.exchange import DROPPED, TRAIN_VERSION, read_pairs
from dpo_loop.files import write_jsonl
from dpo_loop.policies import describe_policy
from dpo_loop.training.launch import launch
from dpo_loop.training.loop.held_out import held_out_rows
from dpo_loop.training.model_checks import vocabulary_size
from dpo_loop.training.objectives.selection import check_vocabulary, select, tally_of
from dpo_loop.training.positions import longest_length
from dpo_loop.training.run import Job, train_adapter
from dpo_loop.types import PolicyRef, StageOutcome

KEY, SELECTED = "key", "selected.jsonl"


def train(
    out: Path, *, pairs: Path, policy: PolicyRef, run_start: PolicyRef, config: TrainingConfig, feedback: Path | None = None
) -> StageOutcome:
    """pairs: the `pair` stage. policy: the one that generated; it is continued. run_start: the fixed start policy of the run. feedback: of KTO.

    Writes adapter/, policy.json, canary.json, metrics.jsonl, alarms.jsonl, dropped.jsonl. Raises NoPairsError if no pair can be trained
    on, PolicyError for an adapter of another base, TrainingDivergedError for a loss that is not finite, a failed self-check or an alarm
    that stops, InputError for token ids of another vocabulary and where half a micro-batch does not fit into memory.
    """
    found = list(read_pairs(pairs))
    max_length = longest_length(config.max_length, policy.base, stage="train")
    kept, dropped = select(found, max_length=max_length)
    held_out = held_out_rows(kept, config.held_out, seed=config.seed)
    write_jsonl(out / DROPPED, dropped)
    tally = tally_of(len(held_out), len(kept), dropped)
    if not kept:
        raise NoPairsError(
            f"no pair of {pairs} can be trained on: {tally.parts}; training.max_length is {config.max_length} tokens, and the model takes "
            f"{max_length} of them"
        )
    reference = policy if config.reference == "round_start" else run_start
    for each in {policy.key: policy, reference.key: reference}.values():
        _check_unchanged(each)
    check_vocabulary(found, vocab_size=vocabulary_size(policy.base), where=str(pairs))
    keep = scratch(out)
    write_jsonl(keep / SELECTED, kept)
    job = Job(
        out=out,
        keep=keep,
        stage_key=(keep / KEY).read_text(),
        pairs=keep / SELECTED,
        held_out=tuple(held_out),
        feedback=feedback,
        policy=policy,
        reference=reference,
        config=config.model_copy(update={"max_length": max_length}),
    )
    alone = config.num_processes == 1 and config.accelerate_config is None
    outcome = train_adapter(job) if alone else launch(job)
    return outcome.model_copy(update={"tallies": (tally, *outcome.tallies)})


def _check_unchanged(policy: PolicyRef) -> None:
    """Raises PolicyError if base or adapter cannot be used together, CorruptArtifactError if their content is no longer what it was."""
    adapter = None if policy.adapter is None else Path(policy.adapter)
    found = describe_policy(Path(policy.base), revision=policy.revision, adapter=adapter)
    if found.key != policy.key:
        raise CorruptArtifactError(
            f"the policy at {policy.adapter or policy.base} has changed since it was recorded: key {found.key}, recorded {policy.key}. "
            "Restore the files, or start a new run from them."
        )


TRAIN = Stage(name="train", version=TRAIN_VERSION, run=train)
