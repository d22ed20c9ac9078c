"""The last layer's MLP, computed only where something is scored: no later layer attends to what the other positions would become.

Half of a row of prompts and completions is prompt, and an MLP is most of a layer. Shapes: T tokens of all rows, U of them that are scored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "scored_U"


def speed_up(model: Any) -> None:
    """Make the last MLP heed `seeing_only`. A model whose last layer has none of that name is left as it is."""
    if (mlp := _last_mlp(model)) is not None:
        vars(mlp)[_ATTRIBUTE] = None
        mlp.forward = partial(_forward, mlp, mlp.forward)


def restore(model: Any) -> None:
    """The MLP's own forward again."""
    if (mlp := _last_mlp(model)) is not None:
        vars(mlp).pop("forward", None)
        vars(mlp).pop(_ATTRIBUTE, None)


@contextmanager
def seeing_only(model: Any, scored_S: Tensor) -> Iterator[None]:
    """Of a forward inside. scored_S: places among all tokens. Not with gradient checkpointing, which forwards the layer once more later."""
    mlp = _last_mlp(model)
    if mlp is None or _ATTRIBUTE not in vars(mlp) or getattr(model, "is_gradient_checkpointing", False):
        yield
        return
    vars(mlp)[_ATTRIBUTE] = torch.unique(scored_S)
    try:
        yield
    finally:
        vars(mlp)[_ATTRIBUTE] = None


def _last_mlp(model: Any) -> Any:
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stacks = [module for module in model.base_model.children() if isinstance(module, torch.nn.ModuleList) and len(module) == depth]
    return getattr(stacks[0][-1], "mlp", None) if len(stacks) == 1 else None


def _forward(mlp: Any, own: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    scored_U = vars(mlp)[_ATTRIBUTE]
    if scored_U is None or args or kwargs:
        return own(hidden, *args, **kwargs)
    flat_TH = hidden.flatten(0, -2)
    out = own(flat_TH.index_select(0, scored_U).unsqueeze(0))
    if not isinstance(out, Tensor):  # experts that also return what their router said
        return own(hidden)
    return torch.zeros_like(flat_TH).index_copy(0, scored_U, out[0].to(flat_TH.dtype)).view_as(hidden)
