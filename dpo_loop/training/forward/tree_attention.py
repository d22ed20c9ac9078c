"""Attention over a packed row of trees (packing.py), under one name in transformers' attention interface.

Every branch attends to its own trunk and to itself; nothing attends to another tree. Three ways compute it:
- CPU: flash kernels over spans of the row, no copy of a key and no mask. A branch's attention to its trunk and to itself are two
  calls, joined by their log-sum-exps (as blocks are in https://arxiv.org/abs/2205.14135); the gradient of each part needs only the
  joined output and log-sum-exp.
- CUDA: variable-length flash attention, queries a branch, keys its trunk and itself.
- Anywhere, for what kernels do not know (attention soft-caps, sinks) and for sliding windows shorter than a sequence: segment by segment.

Shapes: Q and K heads of queries and keys, T tokens of the row, D head size; S, L queries and keys of one segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface

from dpo_loop.training.forward.packing import Span, TreeLayout

NAME = "dpo_loop_tree"
"""Of the implementation, for `model.set_attn_implementation`."""

ONLY_SCORED = "attends_only_where_scored"
"""Of an attention module, among its own attributes: nobody looks at what its other positions become."""

_BLOCK = 192
"""Queries from which on the CPU's kernel takes 64 at a time in place of 32, a quarter faster."""
_CUT_FROM = 256
"""Tokens of a causal span whose last block is cut off: one of 288 takes 0.99 of the time then, one of 384 or 640 0.9."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the interface's; a layout says more
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_layout: TreeLayout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """query: [1, Q, T, D], key and value: [1, K, T, D] -> [1, T, Q, D]. Raises ValueError without a layout of one row, or for dropout."""
    if tree_layout is None or query.shape[0] != 1 or query.shape[2] != tree_layout.num_tokens:
        raise ValueError("tree attention needs the tree_layout of the one packed row that it is given")
    if dropout and module.training:
        raise ValueError("tree attention has no attention dropout")
    if torch.is_autocast_enabled(query.device.type):  # not all of these kernels are on autocast's list
        query, key, value = (tensor.to(torch.get_autocast_dtype(query.device.type)) for tensor in (query, key, value))
    window = sliding_window if sliding_window is not None and sliding_window < tree_layout.longest else None
    if softcap is not None or s_aux is not None:
        pieces = [
            _eager(*_segment(query, key, value, *segment), scaling, window, softcap, s_aux) for segment in tree_layout.segments
        ]
        return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _varlen(query, key, value, tree_layout, scaling, window), None
    if query.device.type == "cpu" and window is None and query.shape[-1] == value.shape[-1]:
        calls = _scored_calls(tree_layout) if ONLY_SCORED in vars(module) else _calls(tree_layout)
        out_1QTD: Tensor = _SpanAttention.apply(query, key, value, calls, scaling)  # type: ignore[no-untyped-call]
        return out_1QTD.transpose(1, 2), None
    pieces = [_masked(*_segment(query, key, value, *segment), scaling, window) for segment in tree_layout.segments]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, tree_attention)
AttentionMaskInterface.register(NAME, _no_mask)


# ------------------------------------------------------------------------------------------------------------------ CPU


class _Call(NamedTuple):
    queries: Span
    keys: Span
    causal: bool
    joins: bool
    """What queries and keys got before."""


class _SpanAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, calls: Sequence[_Call], scale: float | None) -> Tensor:
        _, num_heads, num_tokens, size = query.shape
        out = query.new_empty(1, num_tokens, num_heads, size).transpose(1, 2)
        lse = query.new_empty(1, num_heads, num_tokens, dtype=torch.float32)
        if _all_join(calls):
            out.zero_()
            lse.fill_(-torch.inf)
        for queries, keys, causal, joins in calls:
            part, part_lse = _flash(_at(query, queries), _at(key, keys), _at(value, keys), 0.0, causal, scale=scale)
            part_lse = part_lse.to(torch.float32)
            if joins:
                before = lse[:, :, queries.start : queries.end]
                joined = torch.logaddexp(before, part_lse)
                held = _at(out, queries)
                held.mul_((before - joined).exp().unsqueeze(-1)).addcmul_(
                    part, (part_lse - joined).exp().unsqueeze(-1).to(part.dtype)
                )
                before.copy_(joined)
            else:
                _at(out, queries).copy_(part)
                lse[:, :, queries.start : queries.end] = part_lse
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.calls, ctx.scale = calls, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        make = torch.zeros_like if _all_join(ctx.calls) else torch.empty_like
        into = [make(tensor) for tensor in (query, key, value)]
        for queries, keys, causal, joins in ctx.calls:
            grads = _flash_backward(
                _at(grad_out, queries),
                _at(query, queries),
                _at(key, keys),
                _at(value, keys),
                _at(out, queries),
                lse[:, :, queries.start : queries.end],
                0.0,
                causal,
                scale=ctx.scale,
            )
            for grad, span, part in zip(into, (queries, keys, keys), grads, strict=True):
                _at(grad, span).add_(part) if joins else _at(grad, span).copy_(part)
        return (*into, None, None)


def _all_join(calls: Sequence[_Call]) -> bool:
    return all(call.joins for call in calls)


def _calls(layout: TreeLayout) -> list[_Call]:
    """Every token is in one causal call, as query and as key; calls that join others come after those."""
    calls = []
    for tree in layout.trees:
        for span in (tree.stem, *tree.branches[1:]):
            calls += _causal(span)
        if len(tree.others):
            calls.append(_Call(tree.others, tree.prompt, False, True))
    return calls


def _scored_calls(layout: TreeLayout) -> list[_Call]:
    """For what predicts completions alone: branches, and the last token of each prompt, which sees all of it. All calls join."""
    calls = []
    for tree in layout.trees:
        calls.append(_Call(Span(tree.prompt.end - 1, tree.branches[-1].end), tree.prompt, False, True))
        calls += [call._replace(joins=True) for branch in tree.branches for call in _causal(branch)]
    return calls


def _causal(span: Span) -> list[_Call]:
    """The kernel computes the whole square and drops what lies above its diagonal, so a long span is cut: each block sees itself, and all before it."""
    cuts = max(0, (len(span) - _CUT_FROM) // _BLOCK + 1)
    edges = [span.start, *range(span.end - cuts * _BLOCK, span.end + 1, _BLOCK)]
    calls = []
    for block in (Span(*ends) for ends in pairwise(edges) if ends[0] < ends[1]):
        calls.append(_Call(block, block, True, False))
        if block.start > span.start:
            calls.append(_Call(block, Span(span.start, block.start), False, True))
    return calls


def _at(tensor: Tensor, span: Span) -> Tensor:
    return tensor[:, :, span.start : span.end]


# ----------------------------------------------------------------------------------------------------------------- CUDA


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: TreeLayout, scale: float | None, window: int | None) -> Tensor:
    tables = layout.tables(query.device)
    out_TQD = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        key[0].transpose(0, 1).index_select(0, tables.keys),
        value[0].transpose(0, 1).index_select(0, tables.keys),
        tables.starts_q,
        tables.starts_k,
        tables.longest_q,
        tables.longest_k,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out_TQD, Tensor)
    return out_TQD.unsqueeze(0)


# ------------------------------------------------------------------------------------------------------------- anywhere


def _segment(query: Tensor, key: Tensor, value: Tensor, queries: Span, spans: Sequence[Span]) -> tuple[Tensor, Tensor, Tensor]:
    """[1, Q, S, D] and twice [1, Q, L, D]: heads of keys repeated for their groups of queries."""
    groups = query.shape[1] // key.shape[1]
    own = [torch.cat([_at(tensor, span) for span in spans], dim=2).repeat_interleave(groups, dim=1) for tensor in (key, value)]
    return _at(query, queries), own[0], own[1]


def _visible(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """[S, L], true where a query sees a key: queries are the last positions of the keys."""
    at_L = torch.arange(num_keys, device=device)
    gap_SL = at_L[num_keys - num_queries :, None] - at_L[None]
    return gap_SL >= 0 if window is None else (gap_SL >= 0) & (gap_SL < window)


def _masked(query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None) -> Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    if num_queries == num_keys and window is None:
        return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    visible_SL = _visible(num_queries, num_keys, window, query.device)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=visible_SL, scale=scale)


def _eager(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    sinks_Q: Tensor | None,
) -> Tensor:
    """Gemma 2's soft-cap, gpt-oss' sinks: what transformers' eager attention computes."""
    scores_1QSL = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores_1QSL = softcap * torch.tanh(scores_1QSL / softcap)
    visible_SL = _visible(query.shape[2], key.shape[2], window, query.device)
    scores_1QSL = scores_1QSL.masked_fill(~visible_SL, torch.finfo(scores_1QSL.dtype).min)
    if sinks_Q is not None:
        sinks_1QS1 = sinks_Q.to(scores_1QSL.dtype).view(1, -1, 1, 1).expand(1, -1, query.shape[2], 1)
        scores_1QSL = torch.cat([scores_1QSL, sinks_1QS1], dim=-1)
    weights_1QSL = scores_1QSL.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    return weights_1QSL @ value
