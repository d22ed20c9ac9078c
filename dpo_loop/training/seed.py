"""The `seed` stage: the policy that round 0 grades and every later round is compared with, taken as it is or made by SFT."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer

from dpo_loop.artifacts import Stage, scratch
from dpo_loop.config import ModelStart, SftStart, Start
from dpo_loop.errors import InputError, PolicyError, StorageError
from dpo_loop.exchange import CANARY, METRICS, SEED_VERSION
from dpo_loop.files import write_jsonl
from dpo_loop.policies import describe_policy, write_policy
from dpo_loop.progress import say
from dpo_loop.training.canary import everyday_sequences, pick_sequences, write_canary
from dpo_loop.training.dropout import put_dropout_back
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.loop.accumulation import shortage_explained
from dpo_loop.training.loop.batches import cut_for
from dpo_loop.training.loop.fit import Plan, fit
from dpo_loop.training.models import (
    add_adapter,
    build_accelerator,
    load_base,
    load_policy,
    save_adapter,
    set_training_mode,
    trainable_parameters,
)
from dpo_loop.training.objectives.sft import SftExample, SftObjective, read_demonstrations, tokenize
from dpo_loop.training.positions import longest_length
from dpo_loop.types import PolicyRef, StageOutcome

_SNAPSHOT_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
_TOKENIZER_FILES = (
    "tokenizer*",
    "*.jinja",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
)


def seed(out: Path, *, start: Start, model: Path | None, adapter: Path | None, demonstrations: Path | None) -> StageOutcome:
    """model: the directory of the base, None if start.model is a hub id. adapter: of a `model` start; demonstrations: of an `sft` start.

    Writes policy.json, canary.json; for `sft` also metrics.jsonl and model/ (all weights) or adapter/ (LoRA).
    Raises PolicyError for a model or adapter that cannot be used, InputError for demonstrations that cannot.
    """
    if model is None:
        say(f"seed: asking the hub for {start.model}")
    base = model if model is not None else _snapshot(start.model, start.revision)
    revision = base.name if model is None else None  # a snapshot directory is named for its commit
    match start:
        case ModelStart():
            return _take(out, base, revision=revision, adapter=adapter)
        case SftStart():
            if demonstrations is None:
                raise InputError("start.demonstrations is missing: SFT needs a JSONL file of demonstrations")
            return _fine_tune(out, base, revision=revision, start=start, demonstrations=demonstrations)


def _take(out: Path, base: Path, *, revision: str | None, adapter: Path | None) -> StageOutcome:
    policy = describe_policy(base, revision=revision, adapter=adapter)
    say(f"seed: taking {adapter or base} as it is")
    accelerator = build_accelerator("bfloat16")
    loaded = load_policy(policy, accelerator=accelerator)
    sequences = everyday_sequences(AutoTokenizer.from_pretrained(policy.base))
    _publish(out, policy, loaded, sequences, accelerator)
    return StageOutcome(metrics={"kind": "model", "parameters": sum(p.numel() for p in loaded.parameters())})


@shortage_explained("supervised fine-tuning", expected="")
def _fine_tune(out: Path, base: Path, *, revision: str | None, start: SftStart, demonstrations: Path) -> StageOutcome:
    policy, config = describe_policy(base, revision=revision), start.sft
    found = read_demonstrations(demonstrations)
    max_length = longest_length(config.max_length, policy.base, stage="seed")
    examples, tally = tokenize(found, policy.base, max_length=max_length, train_on=config.train_on, where=demonstrations)
    say(f"seed: {len(examples)} demonstrations, {sum(sum(example.scored) for example in examples)} completion tokens")
    accelerator = build_accelerator(config.dtype)
    loaded = load_base(policy.base, accelerator=accelerator, frozen=config.lora is not None)
    if config.lora is not None:
        loaded = add_adapter(loaded, config.lora, seed=config.seed)
    set_training_mode(loaded, gradient_checkpointing=config.gradient_checkpointing)
    scorer = build_scorer(
        loaded,
        device=accelerator.device,
        forward=config.forward,
        longest=max(example.sequence.num_forwarded for example in examples),
        autocast=accelerator.autocast,
    )
    objective = SftObjective(scorer, examples)
    fitted = fit(
        objective,
        plan=Plan(
            stage="seed",
            label="sft",
            num_tokens=[example.sequence.num_forwarded for example in examples],
            cut=cut_for(scorer, objective.sequences),
            epochs=config.epochs,
            per_step=config.examples_per_step,
            micro_batch_tokens=config.micro_batch_tokens,
            checkpoint_every_steps=config.checkpoint_every_steps,
            optimizer=config.optimizer,
            seed=config.seed,
        ),
        model=loaded,
        parameters=trainable_parameters(loaded, adapter_only=config.lora is not None),
        accelerator=accelerator,
        keep=scratch(out),
    )
    loaded.eval()
    write_jsonl(out / METRICS, fitted.rows)
    with scorer.native():
        if config.lora is None:
            _save_model(loaded, out / "model", like=Path(policy.base))
            made = describe_policy(out / "model")
        else:
            save_adapter(loaded, out / "adapter", policy=policy)
            made = describe_policy(base, revision=revision, adapter=out / "adapter")
        _publish(out, made, loaded, pick_sequences(_answers(examples)), accelerator)
    return StageOutcome(
        tallies=(tally,),
        metrics={
            "kind": "sft",
            "steps": len(fitted.rows),
            "first_loss": fitted.rows[0]["loss"],
            "last_loss": fitted.rows[-1]["loss"],
            "packed": scorer.packed,
            "forward_reason": scorer.reason,
        },
    )


def _answers(examples: Sequence[SftExample]) -> list[TokenSequence]:
    """The first answer of each: a canary compares answers, not the turns between them."""
    return [
        TokenSequence(sequence.prompt, sequence.completion[: scored.index(False) if False in scored else None])
        for sequence, scored in examples
    ]


def _publish(out: Path, policy: PolicyRef, loaded: Any, sequences: Any, accelerator: Any) -> None:
    write_canary(
        out / CANARY,
        loaded,
        sequences,
        base_sha256=policy.base_sha256,
        adapter_sha256=policy.adapter_sha256,
        accelerator=accelerator,
    )
    write_policy(out, policy.model_copy(update={"canary": str(out / CANARY)}))


def _save_model(model: Any, out: Path, *, like: Path) -> None:
    """All weights in the dtype in which the start model was published, its dropout too; tokenizer files are copied byte by byte."""
    published = AutoConfig.from_pretrained(like)
    put_dropout_back(model.config, published=published)
    try:
        model.to(published.dtype or torch.float32).save_pretrained(out)
    except SafetensorError as error:
        raise StorageError(f"cannot write the model to {out}: {error}. Free space, then run the same command again.") from error
    for pattern in _TOKENIZER_FILES:
        for path in like.glob(pattern):
            shutil.copyfile(path, out / path.name)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=_SNAPSHOT_FILES, ignore_patterns=["original/*"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise PolicyError(
            f"{hub_id} is neither a directory nor a model that the hub hands out: {error}. Give a directory, mend the id or the revision, or "
            "set HF_TOKEN if it needs a login."
        ) from error


SEED = Stage(name="seed", version=SEED_VERSION, run=seed)
