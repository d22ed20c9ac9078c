"""PEFT's LoRA layer in matrix products alone: y = x W' + s (x A') B' is added up inside the products, forwards and backwards.

PEFT writes `s * B(A(x))` and its sum with the base's output as tensors of their own, and autograd does the same again on the way back. Here nothing of
the size of the output exists but the output. Layers that are given the same input (queries, keys, values) go together: their A's are one
matrix, and the input's gradient is added up inside their products, too. Shapes: T tokens, I inputs, O outputs, R rank, S ranks of all
layers that go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor
from torch.nn import functional

_TOGETHER = ("q_proj", "k_proj", "v_proj")
"""Names, in transformers' attention modules, of layers that are called one after the other with the same input."""


class Lora(NamedTuple):
    """y = x weight' + bias + scaling (x a') b', of one layer."""

    weight_OI: Tensor
    bias_O: Tensor | None
    a_RI: Tensor
    b_OR: Tensor
    scaling: float

    def to(self, kind: torch.dtype) -> Lora:
        bias_O = None if self.bias_O is None else self.bias_O.to(kind)
        return Lora(self.weight_OI.to(kind), bias_O, self.a_RI.to(kind), self.b_OR.to(kind), self.scaling)


def speed_up(model: Any) -> None:
    """Replace the forward of every plain LoRA layer; DoRA, several adapters and quantised bases keep PEFT's."""
    for layer in model.modules():
        if is_plain(layer):
            layer.forward = partial(_forward, layer)
    for parent in model.modules():
        layers = [layer for name in _TOGETHER if (layer := getattr(parent, name, None)) is not None and is_plain(layer)]
        if len(layers) == len(_TOGETHER) and len({layer.in_features for layer in layers}) == 1:
            together = _Together(layers)
            parent.forward = partial(together.inside, parent.forward)
            for index, layer in enumerate(layers):
                layer.forward = partial(together.forward, index)


def restore(model: Any) -> None:
    """PEFT's own forwards again, and those of the modules whose layers go together."""
    for module in model.modules():
        if isinstance(module, Linear) or all(isinstance(getattr(module, name, None), Linear) for name in _TOGETHER):
            vars(module).pop("forward", None)


def is_plain(layer: Any) -> bool:
    if not (type(layer) is Linear and type(layer.base_layer) is torch.nn.Linear and layer.base_layer.weight.is_floating_point()):
        return False
    (name,) = layer.active_adapters if len(layer.active_adapters) == 1 else (None,)
    return name in layer.lora_A and name not in layer.lora_variant and layer.lora_B[name].bias is None


def lora_of(layer: Any) -> Lora | None:
    """What a plain layer computes now; None where dropout, or an adapter that is off or merged, makes it something else."""
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name]
    drops = dropout.training and not isinstance(dropout, torch.nn.Identity)
    if layer.disable_adapters or layer.merged or drops:
        return None
    base = layer.base_layer
    return Lora(base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])


def kind_of(x: Tensor, weight: Tensor) -> torch.dtype:
    """In which products are computed: autocast's, or the base's."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype


def project(x: Tensor, loras: Sequence[Lora]) -> tuple[list[Tensor], Tensor]:
    """What every layer makes of x, [..., O] of [..., I], and x A' of all, [T, S], which `pull_back` needs."""
    low_TS = x.flatten(0, -2) @ _stacked(loras).T
    outs = []
    for lora, low_TR in zip(loras, _of_each(low_TS, loras), strict=True):
        out = functional.linear(x, lora.weight_OI, lora.bias_O)  # no view: a model may change it in place
        out.flatten(0, -2).addmm_(low_TR, lora.b_OR.T, alpha=lora.scaling)
        outs.append(out)
    return outs, low_TS


def pull_back(
    grads: Sequence[Tensor | None], x: Tensor, low_TS: Tensor, loras: Sequence[Lora], *, into_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradients of x, if asked for, and of every layer's A and B: a, b, a, b, ... None for a layer whose output nobody used."""
    x_TI = x.flatten(0, -2)
    back_TS = torch.zeros_like(low_TS)
    grads_b: list[Tensor | None] = []
    used: list[tuple[Tensor, Lora]] = []
    for grad, lora, low_TR, back_TR in zip(grads, loras, _of_each(low_TS, loras), _of_each(back_TS, loras), strict=True):
        if grad is None:
            grads_b.append(None)
            continue
        grad_TO = grad.flatten(0, -2)
        torch.mm(grad_TO, lora.b_OR, out=back_TR).mul_(lora.scaling)
        grads_b.append((low_TR.T @ grad_TO).T.mul(lora.scaling))  # as grad' low it takes twice as long
        used.append((grad_TO, lora))
    grads_a = torch.split(back_TS.T @ x_TI, [len(lora.a_RI) for lora in loras])
    of_adapters = [each for a, b in zip(grads_a, grads_b, strict=True) for each in (None if b is None else a, b)]
    if not into_x:
        return None, of_adapters
    grad_x_TI = back_TS @ _stacked(loras)
    for grad_TO, lora in used:
        grad_x_TI.addmm_(grad_TO, lora.weight_OI)
    return grad_x_TI.view_as(x), of_adapters


def _stacked(loras: Sequence[Lora]) -> Tensor:
    return loras[0].a_RI if len(loras) == 1 else torch.cat([lora.a_RI for lora in loras])


def _of_each(values_TS: Tensor, loras: Sequence[Lora]) -> tuple[Tensor, ...]:
    return torch.split(values_TS, [len(lora.a_RI) for lora in loras], dim=1)


# --------------------------------------------------------------------------------------------------- in a model's modules


def _forward(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    lora = lora_of(layer)
    if lora is None or args or kwargs:
        plain: Tensor = Linear.forward(layer, x, *args, **kwargs)
        return plain
    (out,) = _projected(x, [lora])
    return out


class _Together:
    """Layers of one module, of which the first that is asked computes what all make of its input, while the module's forward runs."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.runs = False
        self.apart = False
        """Once the module was seen not to give all of them the same input."""
        self.input: tuple[Tensor, int] | None = None
        self.outs: dict[int, Tensor] = {}

    def inside(self, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The module's own forward, after which nothing is kept."""
        self.runs = True
        try:
            result = own(*args, **kwargs)
            self.apart = self.apart or bool(self.outs)
            return result
        finally:
            self.runs, self.input, self.outs = False, None, {}

    def forward(self, index: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        version = -1 if x.is_inference() else x._version
        same = self.input is not None and x is self.input[0] and version == self.input[1]
        if same and index in self.outs and not (args or kwargs):
            return self.outs.pop(index)
        self.apart = self.apart or bool(self.outs)
        loras = [lora for layer in self.layers if (lora := lora_of(layer)) is not None]
        if self.apart or not self.runs or len(loras) < len(self.layers) or args or kwargs:
            return _forward(self.layers[index], x, *args, **kwargs)
        self.input, self.outs = (x, version), dict(enumerate(_projected(x, loras)))
        return self.outs.pop(index)


def _projected(x: Tensor, loras: Sequence[Lora]) -> tuple[Tensor, ...]:
    outs: tuple[Tensor, ...] = _Projected.apply(x, loras, *trainable(loras))  # type: ignore[no-untyped-call]
    return outs


def trainable(loras: Sequence[Lora]) -> Iterator[Tensor]:
    """What autograd must see of them, in the order of `pull_back`'s gradients."""
    for lora in loras:
        yield from (lora.a_RI, lora.b_OR)


class _Projected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loras: Sequence[Lora], *_trainable: Tensor) -> tuple[Tensor, ...]:
        kind = kind_of(x, loras[0].weight_OI)
        ctx.kind = x.dtype
        x = x.to(kind)
        outs, low_TS = project(x, [lora.to(kind) for lora in loras])
        keep(ctx, loras, x, low_TS)
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        loras, (x, low_TS) = kept(ctx)
        fitting = [lora.to(x.dtype) for lora in loras]
        grad_x, of_adapters = pull_back(grads, x, low_TS, fitting, into_x=ctx.needs_input_grad[0])
        return (None if grad_x is None else grad_x.to(ctx.kind), None, *as_stored(of_adapters, loras))


def keep(ctx: Any, loras: Sequence[Lora], *tensors: Tensor) -> None:
    """For `kept`, in a backward: through autograd, which sees to it that nobody changes them and that hooks learn of them."""
    ctx.save_for_backward(*tensors, *(part for lora in loras for part in lora[:4]))
    ctx.scalings = [lora.scaling for lora in loras]


def kept(ctx: Any) -> tuple[list[Lora], tuple[Tensor, ...]]:
    saved = ctx.saved_tensors
    num = len(saved) - 4 * len(ctx.scalings)
    parts = [saved[start : start + 4] for start in range(num, len(saved), 4)]
    return [Lora(weight, bias, a, b, scaling) for (weight, bias, a, b), scaling in zip(parts, ctx.scalings, strict=True)], saved[
        :num
    ]


def as_stored(grads: Sequence[Tensor | None], loras: Sequence[Lora]) -> list[Tensor | None]:
    """In the types of the adapters' weights."""
    return [None if grad is None else grad.to(part.dtype) for grad, part in zip(grads, trainable(loras), strict=True)]
