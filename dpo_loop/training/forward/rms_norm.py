"""RMSNorm and its gradient in fewer passes over memory: [2040, 512] on two CPU cores in 2.0 ms, where transformers' takes 5.0 (LOG.md).

y = w x / rms(x), or (1 + w) x / rms(x) as in Gemma (https://arxiv.org/abs/1910.07467). What a module computes is not told by its name: it is
tried. Only fp32, and only a frozen weight. Shapes: H hidden size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

_CLOSE = 1e-5


def speed_up(model: Any) -> None:
    """Replace the forward of every RMSNorm that is one of the two."""
    for module in model.modules():
        if (offset := _offset(module)) is not None:
            module.forward = partial(_forward, module, offset)


def restore(model: Any) -> None:
    """The modules' own forwards again."""
    for module in model.modules():
        if _looks_like_one(module):
            vars(module).pop("forward", None)


def _looks_like_one(module: torch.nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith("RMSNorm") and isinstance(weight, Tensor) and weight.ndim == 1


@torch.no_grad()
def _offset(module: Any) -> float | None:
    """What is added to the weight; None for a module that computes something else, or must not be replaced."""
    if not _looks_like_one(module) or module.weight.requires_grad or module.weight.dtype != torch.float32:
        return None
    wide = torch.linspace(-2, 3, 2 * len(module.weight), device=module.weight.device).view(1, 2, -1)
    trials = (wide, 1e-3 * wide)  # in the second one eps counts
    try:
        own = [type(module).forward(module, trial) for trial in trials]
    except Exception:  # one that takes more than its input
        return None
    for offset in (0.0, 1.0):
        if _eps(module) is not None and all(
            torch.allclose(values, _normed(module, offset, trial), rtol=_CLOSE, atol=1e-3 * _CLOSE)
            for values, trial in zip(own, trials, strict=True)
        ):
            return offset
    return None


def _eps(module: Any) -> float | None:
    found: float | None = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return found


def _forward(module: Any, offset: float, x: Tensor) -> Tensor:
    if x.dtype == torch.float32 and not module.weight.requires_grad:
        return _normed(module, offset, x)
    own: Tensor = type(module).forward(module, x)
    return own


def _normed(module: Any, offset: float, x: Tensor) -> Tensor:
    weight_H = module.weight + offset if offset else module.weight
    normed: Tensor = _RmsNorm.apply(x, weight_H, _eps(module))  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, weight_H)
        normed: Tensor = (x * scale).mul_(weight_H)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight_H = ctx.saved_tensors
        grad = grad * weight_H
        along = (grad * x).sum(dim=-1, keepdim=True)
        return grad.mul_(scale).addcmul_(x, along.mul_(scale.pow(3)).div_(-x.shape[-1])), None, None
