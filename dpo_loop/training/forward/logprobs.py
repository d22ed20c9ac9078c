"""The one producer of per-token log-probs: SFT, preferences and the reference all ask a `Scorer`.

Shapes: B sequences, L padded length, T tokens of a packed row, N completion tokens of the whole batch, H hidden size, V vocabulary.

Rows are packed trees (packing.py) where a probe (probe.py) shows that the model computes the same as in separate forwards, else padded on the
right without an attention mask: under a causal mask a token never sees what follows it, so padding cannot reach a scored position.
The head is computed at completion positions only: by ours (head.py), or, where the model's is not known to be the same, by the
model's own forward, whose head a pre-hook lets see only those rows. No [B, L, V] exists either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpo_loop.training.forward import last_layer, shortcuts
from dpo_loop.training.forward.head import Head, token_logprobs
from dpo_loop.training.forward.packing import PackedRow, pack
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.forward.tree_attention import NAME


class TokenScores(NamedTuple):
    """Of all completion tokens, sequence after sequence: fp32 [N], nats, at temperature 1."""

    logps_N: Tensor
    """log p(token | everything before it); differentiable."""
    log_collisions_N: Tensor | None
    """log of the sum over the vocabulary of p squared, without gradient; None where it was not asked for."""


@dataclass(frozen=True)
class Scorer:
    """model: of transformers or PEFT. packed: else sequences are padded rows. head: None leaves it to the model.

    native_attention: the implementation that the model came with. shortcuts: whether they are taken. reason: why it is so, for the metrics
    of a stage.
    """

    model: Any
    device: torch.device
    packed: bool
    head: Head | None
    native_attention: str
    shortcuts: bool = True
    reason: str = ""

    @property
    def route(self) -> dict[str, bool]:
        """What a log-prob's last bits depend on."""
        return {"packed": self.packed, "own_head": self.head is None, "shortcuts": self.shortcuts}

    def __call__(self, sequences: Sequence[TokenSequence], *, with_collisions: bool = False) -> TokenScores:
        row = pack(sequences).to(self.device) if self.packed else None
        if row is not None:
            inputs = {"input_ids": row.ids_1T, "position_ids": row.positions_1T, "tree_layout": row.layout}
            scored_S, targets_S = row.scored_S, row.targets_S
        else:
            ids_BL, scored_S, targets_S = pad(sequences, self.device)
            inputs = {"input_ids": ids_BL}
        with last_layer.seeing_only(bare_model(self.model), scored_S):
            if self.head is None:
                logps, collisions = _by_the_model(self.model, inputs, scored_S, targets_S, with_collisions=with_collisions)
            else:
                hidden: Tensor = bare_model(self.model).base_model(**inputs, use_cache=False).last_hidden_state
                scored_SH = hidden.flatten(0, 1).index_select(0, scored_S)
                logps, collisions = token_logprobs(scored_SH, targets_S, self.head, with_collisions=with_collisions)
        return TokenScores(_as_asked(logps, row), None if collisions is None else _as_asked(collisions, row))

    @contextmanager
    def native(self) -> Iterator[None]:
        """The model as it came: its own attention and its own modules, for forwards that are none of ours."""
        set_attention(self.model, self.native_attention)
        try:
            with shortcuts.left(bare_model(self.model)) if self.shortcuts else nullcontext():
                yield
        finally:
            if self.packed:
                set_attention(self.model, NAME)


def completion_logprobs(model: Any, sequences: Sequence[TokenSequence], *, device: torch.device) -> Tensor:
    """fp32 [N] of the model's own forward over padded rows: what a Scorer is measured by."""
    ids_BL, scored_N, targets_N = pad(sequences, device)
    logps_N, _ = _by_the_model(model, {"input_ids": ids_BL}, scored_N, targets_N, with_collisions=False)
    return logps_N


def pad(sequences: Sequence[TokenSequence], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, L], zero where there is no token; positions of the scored ones in the flattened [B * L], and their targets, [N] each."""
    width = max(sequence.num_forwarded for sequence in sequences)
    ids_BL = torch.zeros(len(sequences), width, dtype=torch.long)
    scored: list[int] = []
    targets: list[int] = []
    for index, (prompt, completion) in enumerate(sequences):
        forwarded = prompt + completion[:-1]
        ids_BL[index, : len(forwarded)] = torch.tensor(forwarded)
        first = index * width + len(prompt) - 1
        scored.extend(range(first, first + len(completion)))
        targets.extend(completion)
    return ids_BL.to(device), torch.tensor(scored, device=device), torch.tensor(targets, device=device)


def bare_model(model: Any) -> Any:
    """The transformers model inside a PEFT model, adapter layers included."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def set_attention(model: Any, implementation: str) -> None:
    """Raises ValueError for a model that computes attention by itself: it takes no other."""
    bare = bare_model(model)
    if bare.config._attn_implementation == implementation:
        return
    if not bare._can_set_attn_implementation():
        raise ValueError(f"{type(bare).__name__} takes no attention but its own")
    bare.set_attn_implementation(implementation)


def _as_asked(values_S: Tensor, row: PackedRow | None) -> Tensor:
    return values_S if row is None or row.asked_N is None else values_S.index_select(0, row.asked_N)


def _by_the_model(
    model: Any, inputs: dict[str, Any], scored_N: Tensor, targets_N: Tensor, *, with_collisions: bool
) -> tuple[Tensor, Tensor | None]:
    with _head_sees_only(bare_model(model).get_output_embeddings(), scored_N):
        logits_NV: Tensor = model(**inputs, use_cache=False).logits[0].float()
    norm_N = logits_NV.logsumexp(dim=1)
    logps_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1) - norm_N
    return logps_N, (2 * logits_NV.detach()).logsumexp(dim=1) - 2 * norm_N.detach() if with_collisions else None


@contextmanager
def _head_sees_only(head: torch.nn.Module, scored_N: Tensor) -> Iterator[None]:
    def gather(_module: torch.nn.Module, args: tuple[Tensor]) -> Tensor:
        (hidden_BLH,) = args
        return hidden_BLH.flatten(0, 1).index_select(0, scored_N).unsqueeze(0)

    handle = head.register_forward_pre_hook(gather)
    try:
        yield
    finally:
        handle.remove()
