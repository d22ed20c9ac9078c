"""Parts of a model that are computed faster than by its own modules, to the same values: forwards of single modules are replaced, and put back.

model: of transformers, without PEFT's wrapper; its adapter layers are inside. The probe (probe.py) measures a model with its shortcuts taken, so a module that only looks like one that it is not is found out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dpo_loop.training.forward import last_mlp, lora_linear, rms_norm

_ALL = (lora_linear, rms_norm, last_mlp)


def take(model: Any) -> None:
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
