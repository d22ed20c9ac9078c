"""Many sequences as one row in which every prompt and every completion lies once: `[prompt | completion 1 | completion 2 | prompt | ...]`.

A prompt with its completions is a tree: the prompt is the trunk, each completion a branch that sees the trunk and itself. Positions begin at
0 in every trunk and go on after the trunk in every branch. The last token of a completion predicts nothing that is scored,
so it is not in the row; the last token of the trunk predicts the first one of every branch.

Shapes: T tokens of the row, S scored tokens of the distinct completions, N completion tokens as they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dpo_loop.training.forward.sequences import TokenSequence


@dataclass(frozen=True, slots=True)
class Span:
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Tree:
    """Where a prompt and its completions lie in the row. Branches of one-token completions have no length."""

    prompt: Span
    branches: tuple[Span, ...]

    @property
    def stem(self) -> Span:
        """The prompt and its first branch: plain causal attention."""
        return Span(self.prompt.start, self.branches[0].end)

    @property
    def others(self) -> Span:
        """All branches but the first, which lie side by side."""
        return Span(self.branches[0].end, self.branches[-1].end)


class VarlenTables(NamedTuple):
    """What variable-length kernels get: causal from the right end, one entry per segment."""

    keys: Tensor
    """Positions in the row, segment after segment: a trunk once for each of its branches."""
    starts_q: Tensor
    starts_k: Tensor
    """Cumulative, int32, one more than there are segments."""
    longest_q: int
    longest_k: int


@dataclass(frozen=True)
class TreeLayout:
    trees: tuple[Tree, ...]
    num_tokens: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its completions."""
        return max(len(tree.prompt) + len(branch) for tree in self.trees for branch in tree.branches)

    @cached_property
    def segments(self) -> list[tuple[Span, tuple[Span, ...]]]:
        """Who attends to whom, causally from the right end: (queries, keys). In the order of the row."""
        found: list[tuple[Span, tuple[Span, ...]]] = []
        for tree in self.trees:
            found.append((tree.stem, (tree.stem,)))
            found += [(branch, (tree.prompt, branch)) for branch in tree.branches[1:] if len(branch)]
        return found

    def tables(self, device: torch.device) -> VarlenTables:
        """Made once for all layers."""
        if device not in self._tables:
            self._tables[device] = _varlen_tables(self.segments, device)
        return self._tables[device]

    @cached_property
    def _tables(self) -> dict[torch.device, VarlenTables]:
        return {}


@dataclass(frozen=True)
class PackedRow:
    """ids_1T and positions_1T go through the model; scored_S are positions in the row, targets_S what comes after them."""

    ids_1T: Tensor
    positions_1T: Tensor
    layout: TreeLayout
    scored_S: Tensor
    targets_S: Tensor
    asked_N: Tensor | None
    """For each completion token asked for, its place among the scored ones; None where they are the same."""

    def to(self, device: torch.device) -> PackedRow:
        asked_N = None if self.asked_N is None else self.asked_N.to(device)
        tensors = (self.ids_1T, self.positions_1T, self.scored_S, self.targets_S)
        ids_1T, positions_1T, scored_S, targets_S = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return PackedRow(ids_1T, positions_1T, self.layout, scored_S, targets_S, asked_N)


def _varlen_tables(segments: Sequence[tuple[Span, Sequence[Span]]], device: torch.device) -> VarlenTables:
    lengths_q = [len(queries) for queries, _ in segments]
    lengths_k = [sum(map(len, spans)) for _, spans in segments]
    starts_q, starts_k = (
        torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device) for lengths in (lengths_q, lengths_k)
    )
    keys = torch.cat([torch.arange(span.start, span.end) for _, spans in segments for span in spans]).to(device)
    return VarlenTables(keys, starts_q, starts_k, max(lengths_q), max(lengths_k))


def num_packed(sequences: Sequence[TokenSequence]) -> int:
    """Tokens of the row that these sequences make."""
    prompts = {sequence.prompt for sequence in sequences}
    return sum(map(len, prompts)) + sum(len(completion) - 1 for _, completion in set(sequences))


def pack(sequences: Sequence[TokenSequence]) -> PackedRow:
    """Trees in the order in which their prompts come, branches in the order of their completions; nothing is forwarded twice."""
    grouped: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = {}
    for index, (prompt, completion) in enumerate(sequences):
        grouped.setdefault(prompt, {}).setdefault(completion, []).append(index)
    row = _Row()
    places: list[tuple[int, int]] = [(0, 0)] * len(sequences)
    for prompt, completions in grouped.items():
        row.begin(prompt)
        for completion, indices in completions.items():
            place = row.grow(len(prompt), completion)
            for index in indices:
                places[index] = place
        row.finish()
    in_order = [place for place, _ in places] == sorted({place for place, _ in places})
    asked = None if in_order else torch.cat([torch.arange(first, first + count) for first, count in places])
    return PackedRow(
        ids_1T=torch.tensor([row.ids]),
        positions_1T=torch.tensor([row.positions]),
        layout=TreeLayout(tuple(row.trees), len(row.ids)),
        scored_S=torch.tensor(row.scored),
        targets_S=torch.tensor(row.targets),
        asked_N=asked,
    )


@dataclass
class _Row:
    """A row that is being laid out."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    trees: list[Tree] = field(default_factory=list)
    prompt: Span = Span(0, 0)
    branches: list[Span] = field(default_factory=list)

    def begin(self, prompt: tuple[int, ...]) -> None:
        self.prompt = Span(len(self.ids), len(self.ids) + len(prompt))
        self.branches = []
        self.ids += prompt
        self.positions += range(len(prompt))

    def grow(self, prompt_length: int, completion: tuple[int, ...]) -> tuple[int, int]:
        """(place among the scored tokens, tokens) of the completion."""
        branch = Span(len(self.ids), len(self.ids) + len(completion) - 1)
        self.ids += completion[:-1]
        self.positions += range(prompt_length, prompt_length + len(branch))
        self.branches.append(branch)
        place = len(self.scored)
        self.scored += [self.prompt.end - 1, *range(branch.start, branch.end)]
        self.targets += completion
        return place, len(completion)

    def finish(self) -> None:
        self.trees.append(Tree(self.prompt, tuple(self.branches)))
