"""Reference log-probs: computed once, before training, in large batches without gradients, and kept in the stage's scratch.

The file's name is a hash over what the values depend on (weights, adapter, precision, token ids, code), never a path, so a retry
finds them and nothing stale is ever used; a few rows are computed again on loading all the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from dpo_loop.errors import TrainingDivergedError
from dpo_loop.progress import say
from dpo_loop.training.batches import micro_batches
from dpo_loop.training.logprobs import completion_logprobs
from dpo_loop.training.models import load_policy
from dpo_loop.training.sequences import TokenSequence
from dpo_loop.types import PolicyRef, content_id

PRODUCER_VERSION = 1
"""Bumped when `completion_logprobs` changes what it computes."""
NUM_CHECKED = 8
SAY_EVERY_S = 2.0


def tolerance(accelerator: Any) -> float:
    """How far two computations of the same log-prob may lie apart, nats per token (facts/training.md §11)."""
    return 5e-2 if accelerator.mixed_precision == "bf16" else 1e-3


def reference_logprobs(
    policy: PolicyRef, sequences: Sequence[TokenSequence], *, accelerator: Any, keep: Path, max_tokens: int
) -> list[Tensor]:
    """Per-token log-probs of every completion under `policy`: one fp32 tensor on the CPU per sequence, nats.

    Raises TrainingDivergedError if saved values do not agree with a few that are computed again.
    """
    path = keep / f"reference-{_key(policy, sequences, accelerator)}.safetensors"
    model = load_policy(policy, accelerator=accelerator)
    lengths = [len(sequence.completion) for sequence in sequences]
    if path.is_file():
        values = list(torch.split(load_file(path)["logprobs"], lengths))
        _check(model, sequences, values, accelerator, path)
        say(f"train: reference of {len(values)} completions, kept from before")
        return values
    values = _score_all(model, sequences, accelerator, max_tokens)
    aside = path.with_suffix(".tmp")
    with aside.open("wb") as file:
        file.write(save({"logprobs": torch.cat(values)}))
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    return values


def _key(policy: PolicyRef, sequences: Sequence[TokenSequence], accelerator: Any) -> str:
    return content_id(PRODUCER_VERSION, policy.key, accelerator.mixed_precision, [[s.prompt, s.completion] for s in sequences])


def _score_all(model: Any, sequences: Sequence[TokenSequence], accelerator: Any, max_tokens: int) -> list[Tensor]:
    values: list[Tensor] = [torch.empty(0)] * len(sequences)
    lengths = [sequence.num_forwarded for sequence in sequences]
    num_done, said = 0, time.monotonic()
    window = 512  # sorted by length within it, so that cutting stays cheap for any number of pairs
    for start in range(0, len(sequences), window):
        rows = range(start, min(start + window, len(sequences)))
        for batch in micro_batches(rows, lengths, max_tokens=max_tokens, device=accelerator.device.type):
            for row, logps in zip(batch, score([sequences[row] for row in batch], model, accelerator), strict=True):
                values[row] = logps
            num_done += len(batch)
            if num_done == len(sequences) or time.monotonic() - said >= SAY_EVERY_S:
                said = time.monotonic()
                say(f"train: reference {num_done}/{len(sequences)} completions")
    return values


def score(sequences: Sequence[TokenSequence], model: Any, accelerator: Any) -> tuple[Tensor, ...]:
    with torch.no_grad(), accelerator.autocast():
        logps_N = completion_logprobs(model, sequences, device=accelerator.device).cpu()
    return torch.split(logps_N, [len(sequence.completion) for sequence in sequences])


def _check(model: Any, sequences: Sequence[TokenSequence], values: Sequence[Tensor], accelerator: Any, path: Path) -> None:
    count = min(NUM_CHECKED, len(sequences))
    rows = [index * len(sequences) // count for index in range(count)]
    again = score([sequences[row] for row in rows], model, accelerator)
    worst = max(float((values[row] - logps).abs().mean()) for row, logps in zip(rows, again, strict=True))
    if not worst <= tolerance(accelerator):
        raise TrainingDivergedError(
            f"the reference log-probs kept in {path} differ by {worst:.2g} nats per token from what the reference says now. Remove the "
            "file and run the same command again; if it happens twice, this machine computes unreliably."
        )
