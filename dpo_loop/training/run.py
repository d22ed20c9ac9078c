"""One training of an adapter, as each of its processes runs it: reference, policy, objective, loop; the main one writes the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_loop.config import TrainingConfig
from dpo_loop.exchange import ALARMS, CANARY, METRICS, TRAIN_VERSION
from dpo_loop.files import read_jsonl, write_jsonl
from dpo_loop.policies import adapter_sha256, write_policy
from dpo_loop.progress import say
from dpo_loop.training.canary import pick_sequences, write_canary
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.accumulation import shortage_explained
from dpo_loop.training.loop.alarms import limits_for
from dpo_loop.training.loop.batches import cut_for
from dpo_loop.training.loop.fit import Fitted, Plan, fit
from dpo_loop.training.loop.trackers import tracking
from dpo_loop.training.memory.peaks import memory_limit_bytes, peak_memory_bytes
from dpo_loop.training.memory.plan import REFERENCE_BATCHES, MemoryPlan, plan_memory
from dpo_loop.training.models import (
    add_adapter,
    build_accelerator,
    continue_adapter,
    load_base,
    load_policy,
    save_adapter,
    set_training_mode,
    trainable_parameters,
)
from dpo_loop.training.objectives.examples import Examples, examples_of
from dpo_loop.training.processes import Processes
from dpo_loop.training.reference import reference_logprobs, tolerance
from dpo_loop.training.sharding import free_gathered, shard_base
from dpo_loop.types import PolicyRef, PreferencePair, Record, StageOutcome, content_id


class Job(Record):
    """What a process is told. pairs: JSONL of pairs that can all be trained on; held_out: indices of those that are not.

    out: the stage's directory; keep: its scratch. policy: the one that is continued.
    """

    out: Path
    keep: Path
    stage_key: str
    pairs: Path
    held_out: tuple[int, ...]
    feedback: Path | None
    policy: PolicyRef
    reference: PolicyRef
    config: TrainingConfig


def train_adapter(job: Job) -> StageOutcome:
    """Train, and in the main process write adapter/, policy.json, canary.json, metrics.jsonl and alarms.jsonl into job.out.

    Raises what `fit` raises, InputError for feedback or targets that cannot be trained, PolicyError for models.
    """
    config, policy = job.config, job.policy
    accelerator = build_accelerator(config.dtype)
    processes = Processes(accelerator)
    pairs = list(read_jsonl(job.pairs, PreferencePair))
    examples = examples_of(pairs, held_out=job.held_out, feedback=job.feedback, base=Path(policy.base), config=config)
    memory = plan_memory(
        Path(policy.base),
        config,
        device=accelerator.device.type,
        limit_bytes=memory_limit_bytes(accelerator.device, num_processes=processes.num),
        longest_tokens=examples.widest_tokens,
    )
    _introduce(job, examples, memory, accelerator)
    with (
        tracking(accelerator, config, out=job.out),
        shortage_explained(f"training ({config.loss.kind})", expected=_expected(memory)),
    ):
        reference = _reference(job, examples.referred, accelerator, max_tokens=REFERENCE_BATCHES * memory.micro_batch_tokens)
        model = _start(policy, config, accelerator, gradient_checkpointing=memory.gradient_checkpointing)
        if processes.sharded:
            shard_base(model, accelerator)
            say(f"train: base in {processes.num} shards")
        scorer = build_scorer(
            model,
            device=accelerator.device,
            forward=config.forward,
            longest=examples.longest_tokens,
            autocast=accelerator.autocast,
        )
        say(f"train: forward: {scorer.reason}")
        start_tolerance = tolerance(accelerator) if examples.referred and _starts_at(job) else None
        fitted = fit(
            examples.build(scorer, reference, start_tolerance),
            plan=_plan(job, examples, scorer, memory),
            model=model,
            parameters=trainable_parameters(model, adapter_only=True),
            accelerator=accelerator,
            keep=job.keep,
        )
        model.eval()
        with scorer.native():
            _write(job, model, fitted, chosen=[row[0] for row in examples.rows], accelerator=accelerator, processes=processes)
    figures = _summary(fitted, config, model) | {
        "held_out": len(job.held_out),
        "packed": scorer.packed,
        "forward_reason": scorer.reason,
        "gradient_checkpointing": memory.gradient_checkpointing,
        "num_threads": torch.get_num_threads(),
        "planned_memory_bytes": memory.total_bytes,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
    }
    return StageOutcome(tallies=examples.tallies, metrics=figures)


def _introduce(job: Job, examples: Examples, memory: MemoryPlan, accelerator: Any) -> None:
    config, num_held_out = job.config, len(job.held_out)
    reference = f"reference {config.reference}" if examples.referred else "no reference"
    say(
        f"train: {config.loss.kind} on {len(examples.rows) - len(examples.held_out)} examples, {num_held_out} pairs held out, {reference}, "
        f"{config.start} adapter, on {accelerator.num_processes} x {accelerator.device.type}"
    )
    checkpointing = "with" if memory.gradient_checkpointing else "without"
    say(
        f"train: {memory.micro_batch_tokens} tokens a micro-batch {checkpointing} gradient checkpointing, expected: {_expected(memory)}"
    )
    if not memory.fits:
        say("train: that may not fit; a lower micro_batch_tokens, max_length or lora.rank needs less")


def _expected(memory: MemoryPlan) -> str:
    parts = {
        "weights": memory.weights_bytes,
        "adapter and optimizer": memory.adapter_bytes,
        "activations": memory.activations_bytes,
        "head": memory.head_bytes,
    }
    limit = "" if memory.limit_bytes is None else f" of {memory.limit_bytes / 2**30:.1f}"
    listed = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in parts.items())
    return f"{memory.total_bytes / 2**30:.2f}{limit} GiB ({listed})"


def _reference(job: Job, sequences: Sequence[TokenSequence], accelerator: Any, *, max_tokens: int) -> list[Tensor]:
    if not sequences:
        return []
    return reference_logprobs(
        job.reference,
        sequences,
        accelerator=accelerator,
        keep=job.keep,
        max_tokens=max_tokens,
        forward=job.config.forward,
        quantize_base=job.config.quantize_base,
    )


def _start(policy: PolicyRef, config: TrainingConfig, accelerator: Any, *, gradient_checkpointing: bool) -> Any:
    base = load_base(policy.base, accelerator=accelerator, frozen=True, quantize_base=config.quantize_base)
    if config.start == "continue" and policy.adapter is not None:
        model = continue_adapter(base, Path(policy.adapter), dropout=config.lora.dropout)
    else:
        model = add_adapter(base, config.lora, seed=config.seed)
    set_training_mode(model, gradient_checkpointing=gradient_checkpointing)
    return model


def _starts_at(job: Job) -> bool:
    """Whether the policy at step 0 is the reference, and no dropout blurs it."""
    start_adapter = job.policy.adapter_sha256 if job.config.start == "continue" else None
    same = (job.policy.base_sha256, start_adapter) == (job.reference.base_sha256, job.reference.adapter_sha256)
    return same and job.config.lora.dropout == 0


def _plan(job: Job, examples: Examples, scorer: Scorer, memory: MemoryPlan) -> Plan:
    config = job.config
    return Plan(
        stage="train",
        label=config.loss.kind,
        num_tokens=examples.num_tokens,
        cut=cut_for(scorer, lambda row: examples.rows[row]),
        epochs=config.epochs,
        per_step=examples.per_pair * config.pairs_per_step,
        micro_batch_tokens=memory.micro_batch_tokens,
        checkpoint_every_steps=config.checkpoint_every_steps,
        optimizer=config.optimizer,
        seed=config.seed,
        estimates=examples.spread_of_estimates(scorer),
        held_out=examples.held_out,
        held_out_config=config.held_out,
        alarms=limits_for(config.loss, config.alarms),
        expected_memory=_expected(memory),
        provenance={
            "stage_key": job.stage_key,
            "stage_version": TRAIN_VERSION,
            "config": config.model_dump(mode="json", exclude=set(config.not_in_key)),
            "base_sha256": job.policy.base_sha256,
            "initial_adapter_sha256": job.policy.adapter_sha256 if config.start == "continue" else None,
            "reference": job.reference.key,
            "token_ids": content_id([[list(sequence) for sequence in row] for row in examples.rows]),
        },
        circumstances={**scorer.route, "gradient_checkpointing": memory.gradient_checkpointing},
    )


def _write(
    job: Job, model: Any, fitted: Fitted, *, chosen: Sequence[TokenSequence], accelerator: Any, processes: Processes
) -> None:
    out, made = job.out, job.policy
    if processes.is_main:
        write_jsonl(out / METRICS, fitted.rows)
        write_jsonl(out / ALARMS, fitted.alarms)
        save_adapter(model, out / "adapter", policy=job.policy)
        made = made.model_copy(
            update={
                "adapter": str(out / "adapter"),
                "adapter_sha256": adapter_sha256(out / "adapter"),
                "canary": str(out / CANARY),
            }
        )
    free_gathered(model)
    if processes.is_main or processes.sharded:  # a forward over shards needs all
        write_canary(
            out / CANARY if processes.is_main else job.keep / f"{CANARY}.{processes.index}",
            # Engines serve the base as it is, not the four bits that it was trained over.
            model if job.config.quantize_base is None else load_policy(made, accelerator=accelerator),
            pick_sequences(chosen),
            base_sha256=made.base_sha256,
            adapter_sha256=made.adapter_sha256 or "",
            accelerator=accelerator,
        )
    if processes.is_main:
        write_policy(out, made)


def _summary(fitted: Fitted, config: TrainingConfig, model: Any) -> dict[str, Any]:
    rows, shape = fitted.rows, model.peft_config["default"]
    kept = rows[: fitted.weights_of_step]  # up to the step whose weights are published; after a stop with patience not the last one
    names = ("loss", "accuracy", "margin", "chosen_logprob_change", "rejected_logprob_change", "kl", "falling")
    held_out = ("held_out_loss", "held_out_accuracy", "held_out_margin")
    return {
        "steps": len(rows),
        **{f"{unit}_seen": sum(row[unit] for row in rows) for unit in ("pairs", "examples") if unit in rows[0]},
        "first_loss": rows[0]["loss"],
        **{f"last_{name}": _last(kept, name) for name in (*names, *held_out)},
        "stopped_early_at": fitted.stopped_early_at,
        "weights_of_step": fitted.weights_of_step,
        "alarms": len(fitted.alarms),
        "micro_batch_tokens": fitted.micro_batch_tokens,
        "loss_kind": config.loss.kind,
        "reference": config.reference,
        "lora_rank": shape.r,
        "lora_alpha": shape.lora_alpha,
    }


def _last(rows: Sequence[Mapping[str, Any]], name: str) -> Any:
    """A step of KTO whose examples all have the same thumb has no figures of the other: then they are of the last step that had some."""
    return next((row[name] for row in reversed(rows) if row.get(name) is not None), None)
