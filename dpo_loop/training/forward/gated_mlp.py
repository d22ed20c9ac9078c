"""A gated MLP with LoRA in all of its layers, as one function: down(act(gate(x)) * up(x)).

Autograd would keep four tensors of the MLP's inner size for backward. Here it keeps two, gate and up; the other two are computed again from them.
What a module computes is not told by its names: it is tried. Hooks of its layers do
not run. Shapes: T tokens, H hidden size, I inner size, R ranks of down, S of gate and up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_loop.training.dropout import dropout_paused
from dpo_loop.training.forward.lora_linear import (
    Lora,
    as_stored,
    is_plain,
    keep,
    kept,
    kind_of,
    lora_of,
    project,
    pull_back,
    trainable,
)

_LAYERS = ("gate_proj", "up_proj", "down_proj")


def speed_up(model: Any) -> None:
    """Replace the forward of every MLP that is one."""
    for module in model.modules():
        if _looks_like_one(module) and _is_one(module):
            module.forward = partial(_forward, module)


def restore(model: Any) -> None:
    """The modules' own forwards again, of the last one, too (last_layer.py)."""
    for module in model.modules():
        if _looks_like_one(module):
            vars(module).pop("forward", None)


def _looks_like_one(module: Any) -> bool:
    return all(hasattr(module, name) for name in _LAYERS) and callable(getattr(module, "act_fn", None))


def _loras(mlp: Any) -> list[Lora]:
    """Of gate, up and down; fewer where one of them has none now."""
    return [lora for name in _LAYERS if (lora := lora_of(getattr(mlp, name))) is not None]


@torch.no_grad()
def _is_one(mlp: Any) -> bool:
    """Small and large values alike, of both signs: some clamp what they open."""
    if not all(is_plain(getattr(mlp, name)) for name in _LAYERS):
        return False
    if isinstance(mlp.act_fn, torch.nn.Module) and any(parameter.requires_grad for parameter in mlp.act_fn.parameters()):
        return False
    weight_IH = mlp.gate_proj.base_layer.weight
    values = torch.linspace(-2, 3, 2 * weight_IH.shape[1], device=weight_IH.device, dtype=weight_IH.dtype).view(1, 2, -1)
    try:
        with dropout_paused(mlp):
            return _makes_a_tensor_of_its_own(mlp.act_fn, values) and all(
                _composes(mlp, scale * values) for scale in (1e-3, 1, 1e3)
            )
    except Exception:  # one that takes more than its input
        return False


def _makes_a_tensor_of_its_own(act: Callable[[Tensor], Tensor], values: Tensor) -> bool:
    given = values.clone()
    return act(given).untyped_storage().data_ptr() != given.untyped_storage().data_ptr() and torch.equal(given, values)


def _composes(mlp: Any, x: Tensor) -> bool:
    own = type(mlp).forward(mlp, x)
    return isinstance(own, Tensor) and torch.equal(own, mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)))


def _forward(mlp: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    loras = _loras(mlp)
    if args or kwargs or len(loras) < len(_LAYERS):
        return type(mlp).forward(mlp, x, *args, **kwargs)
    return _GatedMlp.apply(x, mlp.act_fn, loras, *trainable(loras))  # type: ignore[no-untyped-call]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, act: Callable[[Tensor], Tensor], loras: list[Lora], *_trainable: Tensor) -> Tensor:
        kind = kind_of(x, loras[0].weight_OI)
        ctx.act, ctx.kind = act, x.dtype
        x = x.to(kind)
        *into, down = (lora.to(kind) for lora in loras)
        (gate, up), low_TS = project(x, into)
        (out,), low_TR = project(act(gate).to(kind).mul_(up), [down])
        keep(ctx, loras, x, gate, up, low_TS, low_TR)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        loras, (x, gate, up, low_TS, low_TR) = kept(ctx)
        *into, down = (lora.to(x.dtype) for lora in loras)
        gate = gate.detach().requires_grad_()
        with torch.enable_grad():
            bent = ctx.act(gate)
        opened = bent.detach().to(x.dtype)
        inner = opened * up
        grad_inner, of_down = pull_back([grad], inner, low_TR, [down], into_x=True)
        assert grad_inner is not None
        grad_up = torch.mul(grad_inner, opened, out=inner)
        (grad_gate,) = torch.autograd.grad(bent, gate, grad_inner.mul_(up).to(bent.dtype))
        grad_x, of_into = pull_back([grad_gate, grad_up], x, low_TS, into, into_x=ctx.needs_input_grad[0])
        of_adapters = as_stored([*of_into, *of_down], loras)
        return (None if grad_x is None else grad_x.to(ctx.kind), None, None, *of_adapters)
