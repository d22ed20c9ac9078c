"""The last layer, computed only where something is scored: no later layer attends to what the other positions would become.

Half of a row of prompts and completions is prompt. The MLP, most of a layer, is given the scored positions alone; attention over a packed row
(tree_attention.py) is told that it may leave out the others' queries. Shapes: T tokens of all rows, U of them that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dpo_loop.training.forward.tree_attention import ONLY_SCORED

_ATTRIBUTE = "scored_U"


def speed_up(model: Any) -> None:
    """Make the last MLP heed `seeing_only`, if there is one of that name, and tell the last attention."""
    layer = _last_layer(model)
    for module in _attentions(layer):
        vars(module)[ONLY_SCORED] = True
    if (mlp := getattr(layer, "mlp", None)) is not None:
        vars(mlp)[_ATTRIBUTE] = None
        mlp.forward = partial(_forward, mlp, mlp.forward)


def restore(model: Any) -> None:
    """The layer as it came."""
    layer = _last_layer(model)
    for module in _attentions(layer):
        vars(module).pop(ONLY_SCORED, None)
    if (mlp := getattr(layer, "mlp", None)) is not None:
        vars(mlp).pop("forward", None)
        vars(mlp).pop(_ATTRIBUTE, None)


@contextmanager
def seeing_only(model: Any, scored_S: Tensor) -> Iterator[None]:
    """Of a forward inside. scored_S: places among all tokens. Not with gradient checkpointing, which forwards the layer once more later."""
    mlp = getattr(_last_layer(model), "mlp", None)
    if mlp is None or _ATTRIBUTE not in vars(mlp) or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    vars(mlp)[_ATTRIBUTE] = torch.unique(scored_S)
    try:
        yield
    finally:
        vars(mlp)[_ATTRIBUTE] = None


def _last_layer(model: Any) -> Any:
    """None where layers are not in one list."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    return stacks[0][-1] if len(stacks) == 1 else None


def _attentions(layer: Any) -> Iterator[Any]:
    """Modules that know the number of their layer, as those do that call transformers' attention interface."""
    if layer is not None:
        yield from (module for module in layer.modules() if hasattr(module, "layer_idx"))


def _forward(mlp: Any, own: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    scored_U = vars(mlp)[_ATTRIBUTE]
    if scored_U is None or args or kwargs:
        return own(hidden, *args, **kwargs)
    flat_TH = hidden.flatten(0, -2)
    out = own(flat_TH.index_select(0, scored_U).unsqueeze(0))
    if not isinstance(out, Tensor):  # experts that also return what their router said
        return own(hidden)
    return torch.zeros_like(flat_TH).index_copy(0, scored_U, out[0].to(flat_TH.dtype)).view_as(hidden)
