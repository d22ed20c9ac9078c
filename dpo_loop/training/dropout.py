"""Dropout that a base's config.json asks for: off while we train, so that the policy is its reference at step 0; as it was when it is saved.

Modules in eval mode are not enough: transformers checkpoints a layer only in training mode, and many layers (OPT, Starcoder2, Falcon) then
drop by a function of their own. An adapter's dropout is the training's own, and is only paused while something is measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NOISE = "drop"
"""In the names of a config's shares: attention_dropout, resid_pdrop, layerdrop. Not a router's jitter: it is drawn in training mode only, in which
routers never are, and PhiMoE's gates depend on it in eval mode, too."""


def without_dropout(config: Any) -> Any:
    """The config, its shares set to zero: before the model is built, since modules copy them."""
    for part, name in _shares(config):
        setattr(part, name, 0.0)
    return config


def put_dropout_back(config: Any, *, published: Any) -> None:
    """The shares of a config that is to be saved, from the one that the model was published with."""
    kept = {(type(part), name): getattr(part, name) for part, name in _shares(published)}
    for part, name in _shares(config):
        setattr(part, name, kept.get((type(part), name), 0.0))


def _shares(config: Any) -> Iterator[tuple[Any, str]]:
    """Of the config and of those inside it, a multimodal model's text and vision."""
    for name, value in list(vars(config).items()):
        if _NOISE in name and isinstance(value, float):
            yield config, name
    for name in config.sub_configs:
        if (part := getattr(config, name, None)) is not None:
            yield from _shares(part)


@contextmanager
def dropout_paused(model: Any) -> Iterator[None]:
    """For a while, whatever mode the model is in."""
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.training]
    for module in dropouts:
        module.training = False
    try:
        yield
    finally:
        for module in dropouts:
            module.training = True
