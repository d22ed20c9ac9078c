"""Which examples each optimizer step sees, and how a step is cut into micro-batches.

The order is a pure function of (seed, epoch), so a resumed run sees what the uninterrupted one would have seen. An optimizer step
is a fixed number of examples; micro-batches only bound memory and save padding: every micro-batch's sum is divided by the
size of the whole step, so the gradient does not depend on the cut (facts/training.md §7).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.packing import num_packed
from dpo_loop.training.forward.sequences import TokenSequence

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


Cut = Callable[[Sequence[int], int], list[list[int]]]
"""(examples of a step, most tokens of a micro-batch) -> micro-batches. One example more than that makes a micro-batch of its own."""


class Spread(NamedTuple):
    """How examples are spread over micro-batches and processes. num_tokens: that example i puts through the model."""

    cut: Cut
    num_tokens: Sequence[int]


def cut_for(scorer: Scorer, sequences_of: Callable[[int], Sequence[TokenSequence]]) -> Cut:
    """How the examples of a step are cut for this scorer. sequences_of: what example i scores, a pair's chosen and rejected."""
    if scorer.packed:
        return partial(packed_micro_batches, sequences_of=sequences_of)
    return partial(padded_micro_batches, sequences_of=sequences_of, device=scorer.device.type)


def packed_micro_batches(
    rows: Sequence[int], max_tokens: int, *, sequences_of: Callable[[int], Sequence[TokenSequence]]
) -> list[list[int]]:
    """Fill packed rows, longest example first, each into the fullest row that has room. Examples of one prompt come one after the other, since
    a row holds their prompt once."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        by_prompt.setdefault(sequences_of(row)[0].prompt, []).append(row)
    groups = [group for members in by_prompt.values() for group in _fitting(members, max_tokens, sequences_of)]
    sized = sorted(((num_packed(_all(group, sequences_of)), group) for group in groups), key=lambda each: (-each[0], each[1]))
    filled: list[tuple[int, list[int]]] = []
    for size, group in sized:
        room = [(num, index) for index, (num, _) in enumerate(filled) if num + size <= max_tokens]
        if room:
            num, index = max(room)
            filled[index] = (num + size, filled[index][1] + group)
        else:
            filled.append((size, group))
    return [members for _, members in filled]


def _fitting(members: list[int], max_tokens: int, sequences_of: Callable[[int], Sequence[TokenSequence]]) -> Iterator[list[int]]:
    """Examples of one prompt in groups that share a row."""
    group: list[int] = []
    for row in members:
        if group and num_packed(_all([*group, row], sequences_of)) > max_tokens:
            yield group
            group = []
        group.append(row)
    yield group


def _all(rows: Sequence[int], sequences_of: Callable[[int], Sequence[TokenSequence]]) -> list[TokenSequence]:
    return [sequence for row in rows for sequence in sequences_of(row)]


def padded_micro_batches(
    rows: Sequence[int], max_tokens: int, *, sequences_of: Callable[[int], Sequence[TokenSequence]], device: str
) -> list[list[int]]:
    """As `micro_batches`, for examples of the same number of sequences."""
    lengths = {row: len(sequences_of(row)) * max(sequence.num_forwarded for sequence in sequences_of(row)) for row in rows}
    return micro_batches(rows, lengths, max_tokens=max_tokens, device=device)


def micro_batches(
    rows: Sequence[int], lengths: Sequence[int] | Mapping[int, int], *, max_tokens: int, device: str = "cpu"
) -> list[list[int]]:
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
