"""Parts of a model that are computed faster than by its own modules, to the same values: forwards of single modules are replaced, and put back.

model: of transformers, without PEFT's wrapper; its adapter layers are inside. Each is tried on its module first; the probe (probe.py) then compares the log-probs of a model with its shortcuts taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_loop.training.forward import gated_mlp, last_layer, lora_linear, rms_norm, rotary

_ALL = (rotary, lora_linear, rms_norm, gated_mlp, last_layer)
"""In this order: attention rotates, and its projections go together; the last layer's MLP is computed as the others are."""


def take(model: Any) -> None:
    leave(model)
    for each in _ALL:
        each.speed_up(model)


def leave(model: Any) -> None:
    for each in _ALL:
        each.restore(model)


@contextmanager
def left(model: Any) -> Iterator[None]:
    """The model as it came, for a while."""
    leave(model)
    try:
        yield
    finally:
        take(model)
