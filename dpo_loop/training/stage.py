"""The `train` stage: LoRA DPO on a round's pairs, from the promoted adapter to a new immutable one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, scratch
from dpo_loop.config import TrainingConfig
from dpo_loop.errors import CorruptArtifactError, NoPairsError
from dpo_loop.exchange import CANARY, DROPPED, METRICS, TRAIN_VERSION, read_pairs
from dpo_loop.files import write_jsonl
from dpo_loop.policies import adapter_sha256, describe_policy, write_policy
from dpo_loop.progress import say
from dpo_loop.training.canary import pick_sequences, write_canary
from dpo_loop.training.fit import Plan, fit
from dpo_loop.training.models import (
    add_adapter,
    build_accelerator,
    continue_adapter,
    load_base,
    save_adapter,
    set_training_mode,
    trainable_parameters,
)
from dpo_loop.training.preferences import DpoObjective, sequences_of
from dpo_loop.training.reference import reference_logprobs, tolerance
from dpo_loop.types import PolicyRef, PreferencePair, StageOutcome, Tally

_REFERENCE_BATCHES = 2
"""Reference batches are this many times larger than training's: they keep no activations."""


def train(out: Path, *, pairs: Path, policy: PolicyRef, run_start: PolicyRef, config: TrainingConfig) -> StageOutcome:
    """pairs: the `pair` stage. policy: the one that generated; it is continued. run_start: the fixed start policy of the run.

    Writes adapter/, policy.json, canary.json, metrics.jsonl, dropped.jsonl. Raises NoPairsError if no pair can be trained on,
    PolicyError for an adapter of another base, TrainingDivergedError for a loss that is not finite or a failed self-check.
    """
    kept, dropped = select(list(read_pairs(pairs)), max_length=config.max_length)
    write_jsonl(out / DROPPED, dropped)
    tally = _tally(len(kept), dropped)
    if not kept:
        raise NoPairsError(
            f"no pair of {pairs} can be trained on: {tally.parts}; training.max_length is {config.max_length} tokens"
        )
    reference = policy if config.reference == "round_start" else run_start
    for each in {policy.key: policy, reference.key: reference}.values():
        _check_unchanged(each)
    accelerator = build_accelerator(config.dtype)
    chosen, rejected = sequences_of(kept)
    say(f"train: {len(kept)} pairs, reference {config.reference}, {config.start} adapter, on {accelerator.device}")
    reference_logps = reference_logprobs(
        reference,
        [*chosen, *rejected],
        accelerator=accelerator,
        keep=scratch(out),
        max_tokens=_REFERENCE_BATCHES * config.micro_batch_tokens,
    )
    model = _start(policy, config, accelerator)
    objective = DpoObjective(
        model,
        chosen,
        rejected,
        chosen_reference=reference_logps[: len(kept)],
        rejected_reference=reference_logps[len(kept) :],
        config=config,
        device=accelerator.device,
        start_tolerance=tolerance(accelerator) if _starts_at(reference, policy, config) else None,
    )
    rows = fit(
        objective,
        plan=Plan(
            stage="train",
            label="dpo",
            lengths=[2 * max(c.num_forwarded, r.num_forwarded) for c, r in zip(chosen, rejected, strict=True)],
            epochs=config.epochs,
            per_step=config.pairs_per_step,
            micro_batch_tokens=config.micro_batch_tokens,
            checkpoint_every_steps=config.checkpoint_every_steps,
            optimizer=config.optimizer,
            seed=config.seed,
        ),
        parameters=trainable_parameters(model, adapter_only=True),
        accelerator=accelerator,
        keep=scratch(out),
    )
    model.eval()
    write_jsonl(out / METRICS, rows)
    save_adapter(model, out / "adapter", policy=policy)
    made = policy.model_copy(
        update={
            "adapter": str(out / "adapter"),
            "adapter_sha256": adapter_sha256(out / "adapter"),
            "canary": str(out / CANARY),
        }
    )
    write_canary(
        out / CANARY,
        model,
        pick_sequences(chosen),
        base_sha256=made.base_sha256,
        adapter_sha256=made.adapter_sha256,
        accelerator=accelerator,
    )
    write_policy(out, made)
    return StageOutcome(tallies=(tally,), metrics=_summary(rows, config, model))


def select(pairs: list[PreferencePair], *, max_length: int) -> tuple[list[PreferencePair], list[dict[str, Any]]]:
    """Pairs that can be trained on, and a row with its reason for each that cannot: too long pairs are dropped, never cut."""
    kept, dropped = [], []
    for pair in pairs:
        longest = len(pair.prompt_token_ids) + max(len(pair.chosen_token_ids), len(pair.rejected_token_ids))
        if not (pair.prompt_token_ids and pair.chosen_token_ids and pair.rejected_token_ids):
            reason = "empty"
        elif pair.chosen_token_ids == pair.rejected_token_ids:
            reason = "identical"
        elif longest > max_length:
            reason = "too_long"
        else:
            kept.append(pair)
            continue
        dropped.append(
            {
                "prompt_id": pair.prompt_id,
                "chosen_id": pair.chosen_id,
                "rejected_id": pair.rejected_id,
                "reason": reason,
                "num_tokens": longest,
            }
        )
    return kept, dropped


def _tally(num_kept: int, dropped: list[dict[str, Any]]) -> Tally:
    return Tally(
        of="pairs", total=num_kept + len(dropped), parts={"trained": num_kept, **Counter(row["reason"] for row in dropped)}
    )


def _check_unchanged(policy: PolicyRef) -> None:
    """Raises PolicyError if base or adapter cannot be used together, CorruptArtifactError if their content is no longer what it was."""
    adapter = None if policy.adapter is None else Path(policy.adapter)
    found = describe_policy(Path(policy.base), revision=policy.revision, adapter=adapter)
    if found.key != policy.key:
        raise CorruptArtifactError(
            f"the policy at {policy.adapter or policy.base} has changed since it was recorded: key {found.key}, recorded {policy.key}. "
            "Restore the files, or start a new run from them."
        )


def _start(policy: PolicyRef, config: TrainingConfig, accelerator: Any) -> Any:
    base = load_base(policy.base, accelerator=accelerator, frozen=True)
    if config.start == "continue" and policy.adapter is not None:
        model = continue_adapter(base, Path(policy.adapter), dropout=config.lora.dropout)
    else:
        model = add_adapter(base, config.lora, seed=config.seed)
    set_training_mode(model, gradient_checkpointing=config.gradient_checkpointing)
    return model


def _starts_at(reference: PolicyRef, policy: PolicyRef, config: TrainingConfig) -> bool:
    """Whether the policy at step 0 is the reference, and no dropout blurs it."""
    start_adapter = policy.adapter_sha256 if config.start == "continue" else None
    same = (policy.base_sha256, start_adapter) == (reference.base_sha256, reference.adapter_sha256)
    return same and config.lora.dropout == 0


def _summary(rows: list[dict[str, Any]], config: TrainingConfig, model: Any) -> dict[str, Any]:
    shape = model.peft_config["default"]
    names = ("loss", "accuracy", "margin", "chosen_logprob_change", "rejected_logprob_change", "kl")
    return {
        "steps": len(rows),
        "pairs_seen": sum(row["pairs"] for row in rows),
        "first_loss": rows[0]["loss"],
        **{f"last_{name}": rows[-1][name] for name in names},
        "reference": config.reference,
        "lora_rank": shape.r,
        "lora_alpha": shape.lora_alpha,
    }


TRAIN = Stage(name="train", version=TRAIN_VERSION, run=train)
