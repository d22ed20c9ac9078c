"""Rows through the objective, micro-batch by micro-batch, in all processes; and what happens when memory runs out on the way.

Every micro-batch's sum is divided by the size of all the rows, so the gradient depends neither on the cut nor on the number of
processes. Whether a process ran out of memory is itself summed, so all of them learn of it at the same point and begin again together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_loop.errors import InputError
from dpo_loop.training.dropout import dropout_paused
from dpo_loop.training.loop.batches import Cut, Spread
from dpo_loop.training.processes import MicroBatch, Processes

_OUT_OF_MEMORY_WORDS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")


class Objective(Protocol):
    """What is minimised, seen from the loop: examples are row numbers. Sums have the same names in every micro-batch."""

    def size(self, rows: Sequence[int]) -> int:
        """What the sums over these rows are divided by to become means: pairs, or scored tokens."""
        ...

    def estimates(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """One micro-batch: sums, without gradient, that the loss of any row of the step needs (KTO's KL). Mostly there are none: {}."""
        ...

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, Tensor]:
        """One micro-batch: scalar sums over its rows. `loss` is differentiable, the others feed `metrics`. estimates: over the whole step."""
        ...

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:
        """The figures of optimizer step `step`, 0-based, from the sums over all its rows. May raise TrainingDivergedError."""
        ...


class OutOfMemoryError(Exception):
    """A micro-batch did not fit, in one process at least. The text says how much was asked for, where the allocator told."""


class Accumulator:
    """Sums of an objective over rows, with or without their gradient. estimates: of what its estimates are taken; None is as of `sums`."""

    def __init__(
        self,
        objective: Objective,
        *,
        cut: Cut,
        num_tokens: Sequence[int],
        estimates: Spread | None = None,
        accelerator: Any,
        processes: Processes,
        model: Any,
    ) -> None:
        self.objective, self.spread = objective, Spread(cut, num_tokens)
        self.estimates = estimates or self.spread
        self.accelerator, self.processes, self.model = accelerator, processes, model
        self._names: dict[str, list[str]] = {}

    def backward(self, rows: Sequence[int], *, max_tokens: int) -> dict[str, float]:
        """Add the gradient of the mean loss over `rows` to the parameters' grad, of this process's share; the sums over all rows.

        Raises OutOfMemoryError in every process; gradients are then incomplete.
        """
        return self._sums(rows, max_tokens=max_tokens, learns=True)

    def look(self, rows: Sequence[int], *, max_tokens: int) -> dict[str, float]:
        """The sums over `rows` without gradients and without dropout. Raises OutOfMemoryError in every process."""
        with torch.no_grad(), dropout_paused(self.model):
            return self._sums(rows, max_tokens=max_tokens, learns=False)

    def _sums(self, rows: Sequence[int], *, max_tokens: int, learns: bool) -> dict[str, float]:
        with torch.no_grad():
            shared = self._share(rows, self.estimates, max_tokens)
            estimates = self._over(shared, "estimates", lambda micro: self.objective.estimates(micro.rows))
        size = self.objective.size(rows)

        def sums_of(micro: MicroBatch) -> dict[str, Tensor]:
            sums = self.objective.sums(micro.rows, estimates=estimates)
            if learns:
                # Not accelerator.backward, which divides by what ACCELERATE_GRADIENT_ACCUMULATION_STEPS says; there is no scaler: no fp16.
                torch.autograd.backward(sums["loss"] / size if micro.counts else 0 * sums["loss"])
            return sums

        return self._over(self._share(rows, self.spread, max_tokens), "sums", sums_of)

    def _share(self, rows: Sequence[int], spread: Spread, max_tokens: int) -> list[MicroBatch]:
        return self.processes.share(rows, cut=spread.cut, num_tokens=spread.num_tokens, max_tokens=max_tokens)

    def _over(self, share: Sequence[MicroBatch], what: str, one: Callable[[MicroBatch], dict[str, Tensor]]) -> dict[str, float]:
        """Sums over the micro-batches of all processes. What a first call finds to have no names is not called again."""
        if self._names.get(what) == []:
            return {}
        parts: list[dict[str, Tensor]] = []
        failure = ""
        try:
            for micro in share:
                with self.accelerator.autocast():
                    found = one(micro)
                if micro.counts:
                    parts.append({name: value.detach().double() for name, value in found.items()})
        except (RuntimeError, MemoryError) as error:
            failure = out_of_memory(error)
            if not failure:
                raise
            if self.processes.sharded:  # the others wait for its part of a layer, and end with it
                raise OutOfMemoryError(failure) from error
        (num_failed,) = self.processes.total([float(bool(failure))])
        if num_failed:
            raise OutOfMemoryError(failure or "in another process")
        if what not in self._names:
            self._names[what] = self.processes.from_main(lambda: list(parts[0]))
        names = self._names[what]
        mine = (
            torch.stack([torch.stack([part[name] for name in names]) for part in parts]).sum(0).tolist()
            if parts and names
            else [0.0] * len(names)
        )
        return dict(zip(names, self.processes.total(mine), strict=True))


def out_of_memory(error: Exception) -> str:
    """What the allocator said in one line; empty if this is another error."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in text for words in _OUT_OF_MEMORY_WORDS):
        return text.splitlines()[0]
    return ""


@contextmanager
def shortage_explained(what: str, *, expected: str) -> Iterator[None]:
    """Of memory that runs out where a smaller micro-batch does not help: when a model is loaded, or the optimizer's state is made."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if shortage := out_of_memory(error):
            raise does_not_fit(what, shortage, expected=expected) from error
        raise


def does_not_fit(what: str, shortage: str, *, expected: str) -> InputError:
    """expected: what the memory plan said; empty where there was none."""
    planned = f" Expected were {expected}." if expected else ""
    return InputError(
        f"{what} does not fit into memory ({shortage}).{planned} Ways out: a lower micro_batch_tokens or max_length, gradient_checkpointing: true, a "
        "lower lora.rank, quantize_base: nf4, a smaller base, or a larger device. The same command resumes from the last checkpoint."
    )
