"""From hidden states to log-probs without a [T, V] of logits: in chunks, at scored positions only.

A loss sees one log-prob per token, so dL/dh is that token's dL/dlogp times d(logp)/dh = W[y] - p W, which a frozen head lets us compute where
the probabilities are: the forward keeps this direction [N, H], the backward only scales it. Two matrix products instead of the
three of recomputing, and nothing of size V outlives its chunk. A head that is itself trained recomputes its chunks instead.

Shapes: N scored tokens, R of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
"""Of a chunk's logits in fp32: on a CPU what its cache holds, on a GPU what fills it."""
_MIN_ROWS = 64
_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
"""Names, in transformers' configs, of what logits are multiplied by (Cohere; others)."""


@dataclass(frozen=True)
class Head:
    """z = scale * (W h + b), soft-capped to cap * tanh(z / cap) where there is a cap."""

    weight: Tensor
    bias: Tensor | None
    scale: float
    cap: float | None


def head_of(model: Any) -> Head | None:
    """The head of a transformers model as numbers; None where it is not one linear layer, so that only the model can compute it."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    if type(layer) is not torch.nn.Linear or not layer.weight.is_floating_point():
        return None
    scale = 1.0
    for name in _MULTIPLIERS:
        scale *= getattr(config, name, None) or 1.0
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides; HyperCLOVA X multiplies
        scale = scale * divisor if config.model_type == "hyperclovax" else scale / divisor
    return Head(layer.weight, layer.bias, scale, getattr(config, "final_logit_softcapping", None))


def token_logprobs(hidden_NH: Tensor, targets_N: Tensor, head: Head, *, with_collisions: bool) -> tuple[Tensor, Tensor | None]:
    """fp32 [N] log-probs of the targets, and log of the sum of squared probabilities where asked for, without gradient."""
    rows = max(_MIN_ROWS, _CHUNK_BYTES[hidden_NH.device.type] // (4 * head.weight.shape[0]))
    if torch.is_grad_enabled() and head.weight.requires_grad:
        logps_N, collisions_N = _recomputed(hidden_NH, targets_N, head, rows)
    else:
        scored = _StoredDirection.apply(hidden_NH, targets_N, head, rows, with_collisions)  # type: ignore[no-untyped-call]
        logps_N, collisions_N = scored
    return logps_N, collisions_N if with_collisions else None


class _StoredDirection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, targets_N: Tensor, head: Head, rows: int, with_collisions: bool
    ) -> tuple[Tensor, Tensor]:
        num = len(hidden_NH)
        logps_N = torch.empty(num, dtype=torch.float32, device=hidden_NH.device)
        collisions_N = torch.empty_like(logps_N)
        direction_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, num, rows):
            chunk = slice(start, start + rows)
            targets_R1 = targets_N[chunk, None]
            scores_RV, slope_RV = _scores(hidden_NH[chunk], head, with_slope=direction_NH is not None)
            logps_RV = scores_RV.log_softmax(dim=1)
            logps_N[chunk] = logps_RV.gather(1, targets_R1).squeeze(1)
            if direction_NH is None and not with_collisions:
                continue
            probs_RV = logps_RV.exp_()
            if with_collisions:
                collisions_N[chunk] = torch.linalg.vector_norm(probs_RV, dim=1).log().mul_(2)
            if direction_NH is not None:
                # d(logp_y)/dz = 1[y] - p, through the cap's slope and the scale.
                probs_RV.scatter_add_(1, targets_R1, torch.full_like(targets_R1, -1, dtype=probs_RV.dtype))
                if slope_RV is not None:
                    probs_RV.mul_(slope_RV)
                direction_NH[chunk] = probs_RV.to(head.weight.dtype) @ head.weight
        if direction_NH is not None:
            ctx.save_for_backward(direction_NH.mul_(-head.scale))
        ctx.mark_non_differentiable(collisions_N)
        return logps_N, collisions_N

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (direction_NH,) = ctx.saved_tensors
        return direction_NH * grad_N[:, None].to(direction_NH.dtype), None, None, None, None


def _scores(hidden_RH: Tensor, head: Head, *, with_slope: bool) -> tuple[Tensor, Tensor | None]:
    """Logits in fp32, and the slope of the soft-cap at each of them."""
    scores_RV = torch.nn.functional.linear(hidden_RH.to(head.weight.dtype), head.weight, head.bias).float()
    if head.scale != 1.0:
        scores_RV = scores_RV * head.scale
    if head.cap is None:
        return scores_RV, None
    bent_RV = torch.tanh(scores_RV / head.cap)
    return bent_RV * head.cap, 1 - bent_RV.square() if with_slope else None


def _recomputed(hidden_NH: Tensor, targets_N: Tensor, head: Head, rows: int) -> tuple[Tensor, Tensor]:
    parts = []
    chunk_logprobs: Callable[..., tuple[Tensor, Tensor]] = _chunk_logprobs
    for start in range(0, len(hidden_NH), rows):
        chunk = slice(start, start + rows)
        parts.append(checkpoint(chunk_logprobs, hidden_NH[chunk], targets_N[chunk], head, use_reentrant=False))
    return torch.cat([logps for logps, _ in parts]), torch.cat([collisions for _, collisions in parts])


def _chunk_logprobs(hidden_RH: Tensor, targets_R: Tensor, head: Head) -> tuple[Tensor, Tensor]:
    scores_RV, _ = _scores(hidden_RH, head, with_slope=False)
    logps_RV = scores_RV.log_softmax(dim=1)
    collisions_R = (2 * logps_RV.detach()).logsumexp(dim=1)
    return logps_RV.gather(1, targets_R[:, None]).squeeze(1), collisions_R
