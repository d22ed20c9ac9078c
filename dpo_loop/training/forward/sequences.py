"""What is scored: token ids of a prompt and of a completion. Shapes: B sequences, N completion tokens of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenSequence(NamedTuple):
    """Token ids of a prompt, at least one, and of the completion that follows it, at least one."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]

    @property
    def num_forwarded(self) -> int:
        """Tokens that go through the model: the last one predicts nothing that is scored."""
        return len(self.prompt) + len(self.completion) - 1


def sum_by_sequence(values_N: Tensor, sequences: Sequence[TokenSequence]) -> Tensor:
    """Sum per-token values over each completion: [N] -> fp64 [B]. Sums of long completions are too large for fp32 to keep differences exact."""
    lengths_B = torch.tensor([len(sequence.completion) for sequence in sequences])
    owner_N = torch.repeat_interleave(torch.arange(len(sequences)), lengths_B).to(values_N.device)
    return torch.zeros(len(sequences), dtype=torch.float64, device=values_N.device).index_add(0, owner_N, values_N.double())
