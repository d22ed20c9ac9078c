"""The processes of one training as the loop sees them: who computes which micro-batch of a step, and sums over all of them.

There is no DDP wrapper: every process holds the same adapter, computes its share of a step, and the gradients are added up once per
step, as sums, so that the loss curve is that of one process up to the order of additions. With one process every function here is the
identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from dpo_loop.training.loop.batches import Cut
from dpo_loop.training.sharding import wants_shards

Value = TypeVar("Value")


class MicroBatch(NamedTuple):
    """counts: False for one that another process computes too, and that is computed here only to keep in step with it."""

    rows: Sequence[int]
    counts: bool = True


class Processes:
    """num: how many there are. index: of this one; process 0 is the main one, which alone writes files and lines.

    sharded: every forward gathers weights from all processes, so all must make the same number of them.
    """

    def __init__(self, accelerator: Any) -> None:
        self.num: int = accelerator.num_processes
        self.index: int = accelerator.process_index
        self.device: torch.device = accelerator.device
        self.sharded = wants_shards(accelerator)

    @property
    def is_main(self) -> bool:
        return self.index == 0

    def share(self, rows: Sequence[int], *, cut: Cut, num_tokens: Sequence[int], max_tokens: int) -> list[MicroBatch]:
        """This process's micro-batches of a step, balanced by tokens. The main process has one whenever there are rows; the others may not.

        A step that fits into fewer micro-batches than there are processes is cut finer, so that all have work.
        """
        if self.num == 1:
            return [MicroBatch(micro) for micro in cut(rows, max_tokens)]
        fair = math.ceil(sum(num_tokens[row] for row in rows) / self.num)
        micros = cut(rows, min(max_tokens, fair))
        tokens = [sum(num_tokens[row] for row in micro) for micro in micros]
        shares: list[list[MicroBatch]] = [[] for _ in range(self.num)]
        load = [0] * self.num
        for index in sorted(range(len(micros)), key=lambda index: (-tokens[index], index)):
            lightest = load.index(min(load))
            shares[lightest].append(MicroBatch(micros[index]))
            load[lightest] += tokens[index]
        mine = shares[self.index]
        if self.sharded:
            mine += [MicroBatch(micros[-1], counts=False)] * (max(map(len, shares)) - len(mine))
        return mine

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over all processes, fp64; the same bits in each."""
        if self.num == 1:
            return list(values)
        vector = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(vector)
        return vector.tolist()

    def from_main(self, make: Callable[[], Value]) -> Value:
        """What `make` returns in the main process; the others do not call it."""
        if self.num == 1:
            return make()
        box: list[Any] = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0, device=self.device)
        value: Value = box[0]
        return value

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Sum the gradients of all processes, in one message. A parameter that got no gradient anywhere keeps None."""
        if self.num == 1:
            return
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        counts = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=self.device)
        flat = torch.cat([*(gradient.float().reshape(-1) for gradient in gradients), counts])
        dist.all_reduce(flat)
        *sums, counts = torch.split(flat, [*(gradient.numel() for gradient in gradients), len(parameters)])
        for parameter, summed, count in zip(parameters, sums, counts.tolist(), strict=True):
            parameter.grad = summed.view_as(parameter).to(parameter.dtype) if count else None
