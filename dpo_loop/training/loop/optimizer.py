"""AdamW and its learning-rate schedule: fresh in every round."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import assert_never

import torch

from dpo_loop.config import OptimizerConfig


def build_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay, fused=True)


def lr_at(step: int, *, num_steps: int, config: OptimizerConfig) -> float:
    """Learning rate of optimizer step `step`, 0-based: a linear warm-up that does not waste a step at zero, then the schedule, which
    reaches zero one step after the last."""
    warmup_steps = math.ceil(config.warmup_ratio * num_steps)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / (num_steps - warmup_steps)
    match config.schedule:
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))
        case "constant":
            return config.lr
    assert_never(config.schedule)
