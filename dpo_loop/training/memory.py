"""How much memory training needs, from a model's config.json and the training config: no torch, so that `dpo-loop estimate` is quick."""

from __future__ import annotations

from pathlib import Path

from dpo_loop.config import TrainingConfig
from dpo_loop.types import Record


class MemoryPlan(Record):
    """Bytes at the peak of one process. limit_bytes: what there is; None where nobody knows."""

    weights_bytes: int
    adapter_bytes: int
    """Adapter weights, their gradients and AdamW's two moments, fp32."""
    activations_bytes: int
    head_bytes: int
    total_bytes: int
    limit_bytes: int | None
    micro_batch_tokens: int
    gradient_checkpointing: bool
    fits: bool


def plan_memory(base: Path, config: TrainingConfig, *, device: str, limit_bytes: int | None) -> MemoryPlan:
    """device: "cpu" or "cuda". What the config leaves to `auto` is chosen: no checkpointing if it fits, then the largest token budget that fits."""
    raise NotImplementedError
