"""Reference log-probs: computed once, before training, in large batches without gradients, and kept in the stage's scratch.

They are kept per completion, in a store whose name is a hash over what they depend on (weights, adapter, precision, forward, code), never a
path, so a retry finds them, whatever was done before it was stopped is not done again, and nothing stale is ever used; a few are
computed again on loading all the same.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dpo_loop.errors import InputError, TrainingDivergedError
from dpo_loop.progress import say
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.logprob_store import LogprobStore, entry_of
from dpo_loop.training.loop.accumulation import out_of_memory
from dpo_loop.training.loop.batches import cut_for
from dpo_loop.training.models import Quantization, load_policy
from dpo_loop.training.sharding import wants_shards
from dpo_loop.types import PolicyRef, content_id

PRODUCER_VERSION = 3
"""Bumped when a Scorer changes what it computes, or a shard what it holds."""
NUM_CHECKED = 8
SAY_EVERY_S = 2.0
_WINDOW = 512
"""Completions of one shard: what is lost at most when the pass is stopped."""


def tolerance(accelerator: Any) -> float:
    """How far two computations of the same log-prob may lie apart, nats per token (facts/training.md §11)."""
    return 5e-2 if accelerator.mixed_precision == "bf16" else 1e-3


def reference_logprobs(
    policy: PolicyRef,
    sequences: Sequence[TokenSequence],
    *,
    accelerator: Any,
    keep: Path,
    max_tokens: int,
    forward: Literal["auto", "padded"] = "auto",
    quantize_base: Quantization | None = None,
) -> list[Tensor]:
    """Per-token log-probs of every completion under `policy`: one fp32 tensor on the CPU per sequence, nats.

    keep: a folder that all processes of the training share; each computes its part, and all get the whole. max_tokens: of one forward.
    Raises TrainingDivergedError for a log-prob that is not finite, or if kept values do not agree with a few that are computed again;
    InputError if half of max_tokens does not fit into memory either.
    """
    model = load_policy(policy, accelerator=accelerator, quantize_base=quantize_base)
    longest = max(len(sequence.prompt) + len(sequence.completion) for sequence in sequences)
    scorer = build_scorer(model, device=accelerator.device, forward=forward, longest=longest, autocast=accelerator.autocast)
    store = LogprobStore(keep, _store_name(policy, scorer, accelerator, quantize_base))
    entries = [entry_of(sequence) for sequence in sequences]
    distinct = dict(zip(entries, sequences, strict=True))
    kept = {entry: values for entry, values in store.read().items() if entry in distinct}
    accelerator.wait_for_everyone()  # else a process would take a shard that another has just written for one from before
    reference = _Pass(scorer, accelerator, max_tokens, num_all=len(distinct), num_done=len(kept))
    if kept:
        reference.check(kept, distinct, keep)
        reference.say(f"reference of {len(kept)} completions, kept from before")
    windows, sharded = _windows(distinct, accelerator.num_processes), wants_shards(accelerator)
    # Over a base in shards every forward needs all processes: they compute all windows together, and one writes.
    for window in windows if sharded else windows[accelerator.process_index :: accelerator.num_processes]:
        if missing := {entry: sequence for entry, sequence in window.items() if entry not in kept}:
            scored = reference.score(missing)
            if accelerator.is_main_process or not sharded:
                store.write(scored)
    accelerator.wait_for_everyone()
    del model, scorer, reference
    gc.collect()  # PEFT's models are cycles: the next one is loaded where this one was
    values = store.read()
    return [values[entry] for entry in entries]


def _store_name(policy: PolicyRef, scorer: Scorer, accelerator: Any, quantize_base: Quantization | None) -> str:
    route = (*scorer.route.items(), accelerator.mixed_precision, accelerator.device.type, quantize_base)
    return content_id(PRODUCER_VERSION, policy.key, route)


def _windows(distinct: Mapping[bytes, TokenSequence], num_processes: int) -> list[dict[bytes, TokenSequence]]:
    """What is scored and kept together, completions of one prompt side by side. A function of the sequences alone, so that a pass that was stopped
    goes on with the same batches and ends with the same bits."""
    by_prompt: dict[tuple[int, ...], list[bytes]] = {}
    for entry, sequence in distinct.items():
        by_prompt.setdefault(sequence.prompt, []).append(entry)
    ordered = [entry for group in by_prompt.values() for entry in group]
    size = min(_WINDOW, math.ceil(len(ordered) / num_processes))
    return [{entry: distinct[entry] for entry in ordered[start : start + size]} for start in range(0, len(ordered), size)]


@dataclass
class _Pass:
    """One process's forwards over the reference. num_all, num_done: completions, in all processes."""

    scorer: Scorer
    accelerator: Any
    max_tokens: int
    num_all: int
    num_done: int
    said: float = field(default_factory=time.monotonic)
    halved: bool = False

    def score(self, missing: Mapping[bytes, TokenSequence]) -> dict[bytes, Tensor]:
        values: dict[bytes, Tensor] = {}
        for scored in self._batches(missing):
            values |= scored
            self._progress(len(scored))
        return {entry: values[entry] for entry in missing}

    def _batches(self, missing: Mapping[bytes, TokenSequence]) -> Iterator[dict[bytes, Tensor]]:
        entries, sequences = list(missing), list(missing.values())
        waiting = list(range(len(sequences)))
        while waiting:
            for batch in cut_for(self.scorer, lambda row: [sequences[row]])(waiting, self.max_tokens):
                try:
                    scored = self._forward([sequences[row] for row in batch])
                except (RuntimeError, MemoryError) as error:
                    if not out_of_memory(error):
                        raise
                    self._halve(error)
                    break
                waiting = [row for row in waiting if row not in set(batch)]
                yield {entries[row]: logps for row, logps in zip(batch, scored, strict=True)}

    def check(self, kept: Mapping[bytes, Tensor], distinct: Mapping[bytes, TokenSequence], folder: Path) -> None:
        """A few kept values, evenly spread, against what the model says now."""
        known = [entry for entry in distinct if entry in kept]
        count = min(NUM_CHECKED, len(known))
        entries = [known[index * len(known) // count] for index in range(count)]
        again: dict[bytes, Tensor] = {}
        for scored in self._batches({entry: distinct[entry] for entry in entries}):
            again |= scored
        for entry, logps in kept.items():
            _check_finite(distinct[entry], logps)
        worst = float(torch.stack([(kept[entry] - again[entry]).abs().mean() for entry in entries]).max())  # NaN stays NaN
        if not worst <= tolerance(self.accelerator):
            raise TrainingDivergedError(
                f"the reference log-probs kept in {folder} differ by {worst:.2g} nats per token from what the reference says now. Remove "
                f"reference-*.safetensors there and run the same command again; if it happens twice, this machine computes unreliably."
            )

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            say(f"train: {text}")

    def _forward(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, ...]:
        with torch.no_grad(), self.accelerator.autocast():
            logps_N = self.scorer(sequences).logps_N.float().cpu()
        scored = torch.split(logps_N, [len(sequence.completion) for sequence in sequences])
        for sequence, logps in zip(sequences, scored, strict=True):
            _check_finite(sequence, logps)
        return scored

    def _halve(self, error: Exception) -> None:
        if self.halved or wants_shards(self.accelerator):
            raise InputError(
                f"the reference does not fit into memory with {self.max_tokens} tokens at a time either ({str(error).splitlines()[0]}); set "
                "training.micro_batch_tokens lower, or training.quantize_base: nf4"
            ) from error
        self.halved, self.max_tokens = True, max(1, self.max_tokens // 2)
        self.say(f"reference ran out of memory; going on with {self.max_tokens} tokens at a time")

    def _progress(self, num_scored: int) -> None:
        at_once = 1 if wants_shards(self.accelerator) else self.accelerator.num_processes
        self.num_done = min(self.num_all, self.num_done + num_scored * at_once)
        if self.num_done == self.num_all or time.monotonic() - self.said >= SAY_EVERY_S:
            self.said = time.monotonic()
            self.say(f"reference {self.num_done}/{self.num_all} completions")


def _check_finite(sequence: TokenSequence, logps_N: Tensor) -> None:
    if not logps_N.isfinite().all():
        place = int((~logps_N.isfinite()).nonzero()[0])
        raise TrainingDivergedError(
            f"the reference gives token {place + 1} (id {sequence.completion[place]}) of a completion of {len(sequence.completion)} tokens, after a "
            f"prompt of {len(sequence.prompt)}, the log-prob {float(logps_N[place])}; no loss can be taken of that. Either the model overflows, "
            "then try training.dtype: float32; or it rules the token out, then leave out the pairs that have it."
        )
