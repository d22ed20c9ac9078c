"""The one producer of per-token log-probs: SFT, DPO, the reference and the canary all call `completion_logprobs`.

Shapes: B sequences, L padded length, N completion tokens of the whole batch, H hidden size, V vocabulary.

The head is computed at completion positions only: a pre-hook on it gathers those rows, so the model's own forward still does its
scaling and soft-capping and no [B, L, V] exists. Batches are padded on the right and carry no attention mask: under a causal mask
a token never sees what follows it, so padding cannot reach a scored position.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dpo_loop.training.sequences import TokenSequence


class TokenScores(NamedTuple):
    """Of all completion tokens, sequence after sequence: fp32 [N], nats, at temperature 1."""

    logps_N: Tensor
    """log p(token | everything before it); differentiable."""
    log_collisions_N: Tensor | None
    """log of the sum over the vocabulary of p squared, without gradient; None where it was not asked for."""


@dataclass(frozen=True)
class Scorer:
    """The one way from sequences to log-probs: every loss, the reference and the canary go through it."""

    model: Any
    device: torch.device
    packed: bool
    """Whether prompts are shared and rows packed; else sequences are padded rows."""
    reason: str
    """Why so, for the metrics of the stage."""

    def __call__(self, sequences: Sequence[TokenSequence], *, with_collisions: bool = False) -> TokenScores:
        assert not with_collisions
        return TokenScores(completion_logprobs(self.model, sequences, device=self.device), None)


def build_scorer(model: Any, *, device: torch.device, forward: Literal["auto", "padded"]) -> Scorer:
    """`auto` tries the packed forward and takes it if a probe finds that the model computes the same as in separate forwards."""
    return Scorer(model, device, packed=False, reason=f"forward: {forward}")


def completion_logprobs(model: Any, sequences: Sequence[TokenSequence], *, device: torch.device) -> Tensor:
    """log p(token | everything before it) of all completion tokens, sequence after sequence: fp32 [N], nats, temperature 1."""
    width = max(sequence.num_forwarded for sequence in sequences)
    ids_BL = torch.zeros(len(sequences), width, dtype=torch.long)
    rows: list[int] = []
    targets: list[int] = []
    for index, (prompt, completion) in enumerate(sequences):
        forwarded = prompt + completion[:-1]
        ids_BL[index, : len(forwarded)] = torch.tensor(forwarded)
        first = index * width + len(prompt) - 1
        rows.extend(range(first, first + len(completion)))
        targets.extend(completion)
    rows_N = torch.tensor(rows, device=device)
    targets_N = torch.tensor(targets, device=device)
    with _head_sees_only(_head(model), rows_N):
        logits_NV: Tensor = model(input_ids=ids_BL.to(device), use_cache=False).logits[0].float()
    return logits_NV.gather(1, targets_N[:, None]).squeeze(1) - logits_NV.logsumexp(dim=1)


def _head(model: Any) -> torch.nn.Module:
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    head: torch.nn.Module = bare.get_output_embeddings()
    return head


@contextmanager
def _head_sees_only(head: torch.nn.Module, rows_N: Tensor) -> Iterator[None]:
    def gather(_module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        (hidden_BLH,) = args
        return hidden_BLH.flatten(0, 1).index_select(0, rows_N).unsqueeze(0)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
