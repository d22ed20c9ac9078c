"""Which examples each optimizer step sees, and how a step is cut into micro-batches.

The order is a pure function of (seed, epoch), so a resumed run sees what the uninterrupted one would have seen. An optimizer step
is a fixed number of examples; micro-batches only bound memory and save padding: every micro-batch's sum is divided by the
size of the whole step, so the gradient does not depend on the cut (facts/training.md §7).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

LAUNCH_COST_TOKENS = {"cpu": 64, "cuda": 1_024}
"""What one more micro-batch costs beyond its tokens, in tokens: if it saves less padding, a cut does not pay. On the CPU, with the
demo's model, 64 gave 2,600 tokens per CPU second, 256 gave 2,130 and 16 gave 2,500; the figure for CUDA is a guess."""


def epoch_order(num_examples: int, *, seed: int, epoch: int) -> list[int]:
    order = list(range(num_examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def optimizer_steps(num_examples: int, *, epochs: int, per_step: int, seed: int) -> list[list[int]]:
    """The examples of every optimizer step of the training; the last step of an epoch may be smaller."""
    steps = []
    for epoch in range(epochs):
        order = epoch_order(num_examples, seed=seed, epoch=epoch)
        steps += [order[start : start + per_step] for start in range(0, num_examples, per_step)]
    return steps


def micro_batches(rows: Sequence[int], lengths: Sequence[int], *, max_tokens: int, device: str = "cpu") -> list[list[int]]:
    """Cut `rows` into micro-batches of similar length with the least padding plus launch cost, longest first.

    lengths: tokens that example i puts through the model. A micro-batch holds at most max_tokens including padding, or one example.
    device: a key of LAUNCH_COST_TOKENS.
    """
    launch_cost = LAUNCH_COST_TOKENS[device]
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    best: list[tuple[int, int]] = [(0, 0)]  # per prefix: least cost, where its last micro-batch begins
    for end in range(1, len(ordered) + 1):
        widest = lengths[ordered[end - 1]]
        choices = []
        for start in range(end - 1, -1, -1):
            tokens = (end - start) * widest
            if tokens > max_tokens and start < end - 1:
                break
            choices.append((best[start][0] + tokens + launch_cost, start))
        best.append(min(choices))
    cuts = [len(ordered)]
    while cuts[-1] > 0:
        cuts.append(best[cuts[-1]][1])
    return [ordered[start:end] for end, start in pairwise(cuts)]
