"""Rotary positions and their gradient in half the passes over memory, and nothing kept but the table of angles.

y = x cos + (-x2, x1) sin of a head's halves (x1, x2), as GPT-NeoX and Llama have it (https://arxiv.org/abs/2104.09864). transformers calls a
function of the attention's module for it, so a forward is bound once more, to the same globals but for this one name; the module stays as it
is. What the function computes is not told by its name: it is tried. Shapes: Q and K heads of queries and keys, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

_NAME = "apply_rotary_pos_emb"


def speed_up(model: Any) -> None:
    """Rebind the forward of every attention that rotates so."""
    rebound: dict[type, FunctionType | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in rebound:
            rebound[kind] = _rebound(kind.forward)
        if (forward := rebound[kind]) is not None:
            module.forward = partial(forward, module)


def restore(model: Any) -> None:
    """The modules' own forwards again."""
    for module in model.modules():
        if _calls_it(type(module).forward):
            vars(module).pop("forward", None)


def _calls_it(forward: Any) -> bool:
    return isinstance(forward, FunctionType) and not forward.__closure__ and _NAME in forward.__code__.co_names


def _rebound(forward: Any) -> FunctionType | None:
    """None for a forward that does not rotate, or not in this way."""
    if not _calls_it(forward) or not _is_known(own := forward.__globals__.get(_NAME)):
        return None
    twin = FunctionType(
        forward.__code__, forward.__globals__ | {_NAME: partial(_apply, own)}, forward.__name__, forward.__defaults__
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    return twin


@torch.no_grad()
def _is_known(own: Any) -> bool:
    query, key = (torch.linspace(-2, 3, heads * 5 * 8).view(1, heads, 5, 8) for heads in (4, 2))
    cos, sin = (torch.linspace(start, 1, 5 * 4).view(1, 5, 4).repeat(1, 1, 2) for start in (-1, 0.3))
    try:
        theirs = own(query, key, cos, sin)
        return all(
            torch.allclose(one, _rotated(x, cos, sin, 1), rtol=1e-6, atol=1e-6) for one, x in zip(theirs, (query, key), strict=True)
        )
    except Exception:  # one that takes something else, or none at all
        return False


def _apply(own: Callable[..., Any], query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
    """query: [B, Q, T, D], key: [B, K, T, D], cos and sin: [B or 1, T, D], fp32; anything else is left to the module's own function."""
    fits = cos.ndim == 3 and cos.shape[-1] == query.shape[-1] and cos.shape[0] in (1, len(query))
    if args or kwargs or not fits or cos.requires_grad or not query.dtype == key.dtype == cos.dtype == torch.float32:
        return own(query, key, cos, sin, *args, **kwargs)
    return tuple(_Rotated.apply(x, cos, sin) for x in (query, key))  # type: ignore[no-untyped-call]


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """By the angles, or back. Halves of cos and of sin are the same. Written token by token, as projections lie in memory."""
    half = x.shape[-1] // 2
    out = torch.empty_like(x)
    into, given = out.transpose(1, 2), x.transpose(1, 2)
    cos, sin = cos[:, :, None], sin[:, :, None, :half]
    torch.mul(given, cos, out=into)
    into[..., :half].addcmul_(given[..., half:], sin, value=-sign)
    into[..., half:].addcmul_(given[..., :half], sin, value=sign)
    return out
