"""PEFT's LoRA layer in matrix products alone: y = x W' + s (x A') B' is added up inside the products, forwards and backwards.

PEFT writes `s * B(A(x))` and its sum with the base's output as tensors of their own, and autograd does the same again on the way back. Here nothing of
the size of the output exists but the output. Shapes: T tokens, I inputs, O outputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor


def speed_up(model: Any) -> None:
    """Replace the forward of every plain LoRA layer; DoRA, several adapters and quantised bases keep PEFT's."""
    for layer in _plain_layers(model):
        layer.forward = partial(_forward, layer)


def restore(model: Any) -> None:
    """PEFT's own forwards again."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            vars(layer).pop("forward", None)


def _plain_layers(model: Any) -> Iterator[Any]:
    for layer in model.modules():
        if type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear and layer.base_layer.weight.is_floating_point():
            (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
            if name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None:
                yield layer


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, torch.nn.Identity)
    if layer.disable_adapters or layer.merged or drops or args or kwargs:
        plain: Tensor = Linear.forward(layer, x, *args, **kwargs)
        return plain
    base = layer.base_layer
    weight_a, weight_b = layer.lora_A[name].weight, layer.lora_B[name].weight
    fused: Tensor = _LoraLinear.apply(x, base.weight, base.bias, weight_a, weight_b, layer.scaling[name])  # type: ignore[no-untyped-call]
    return fused


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_RI: Tensor, b_OR: Tensor, scaling: float
    ) -> Tensor:
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight_OI.dtype
        x_TI = x.reshape(-1, x.shape[-1]).to(kind)
        cast_a, cast_b, weight = a_RI.to(kind), b_OR.to(kind), weight_OI.to(kind)
        out_TO = torch.nn.functional.linear(x_TI, weight, None if bias_O is None else bias_O.to(kind))
        low_TR = x_TI @ cast_a.T
        out_TO.addmm_(low_TR, cast_b.T, alpha=scaling)
        ctx.save_for_backward(x_TI, low_TR, weight, a_RI, b_OR)
        ctx.scaling, ctx.shape, ctx.kind = scaling, x.shape, x.dtype
        return out_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, low_TR, weight_OI, a_RI, b_OR = ctx.saved_tensors
        grad_TO = grad.reshape(-1, grad.shape[-1])
        kind = grad_TO.dtype
        back_TR = (grad_TO @ b_OR.to(kind)).mul_(ctx.scaling)
        grad_b_OR = (low_TR.T @ grad_TO).T.mul(ctx.scaling).to(b_OR.dtype)  # as grad' low it takes twice as long
        grad_a_RI = (back_TR.T @ x_TI).to(a_RI.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_TO @ weight_OI).addmm_(back_TR, a_RI.to(kind)).view(ctx.shape).to(ctx.kind)
        return grad_x, None, None, grad_a_RI, grad_b_OR, None
