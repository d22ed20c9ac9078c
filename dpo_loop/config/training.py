"""Where a run starts, and how it trains."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from dpo_loop.config.base import Fraction, Settings


class SigmoidLoss(Settings):
    """DPO (arXiv 2305.18290 eq. 7)."""

    kind: Literal["sigmoid"]
    beta: float = Field(0.1, gt=0)


class LoraShape(Settings):
    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    target: str = "all-linear"
    """`all-linear` (every linear layer but the head) or a comma-separated list of module names."""


class OptimizerConfig(Settings):
    lr: float = Field(5e-6, gt=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: Fraction = 0.1
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)


class TrainingConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps", "micro_batch_tokens", "gradient_checkpointing"})
    loss: SigmoidLoss
    nll_weight: float = Field(0.0, ge=0)
    """Weight of the length-normalised negative log-likelihood of chosen, per sequence (arXiv 2404.19733)."""
    lora: LoraShape = LoraShape()
    optimizer: OptimizerConfig = OptimizerConfig()
    start: Literal["continue", "fresh"] = "continue"
    reference: Literal["round_start", "run_start"] = "round_start"
    epochs: int = Field(1, ge=1)
    pairs_per_step: int = Field(64, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    max_length: int = Field(2_048, ge=2)
    """Prompt plus completion, tokens; longer pairs are dropped, never truncated."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = False
    checkpoint_every_steps: int = Field(50, ge=1)
    seed: int = 0


class SftConfig(Settings):
    not_in_key: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps", "micro_batch_tokens"})
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4)
    epochs: int = Field(1, ge=1)
    examples_per_step: int = Field(64, ge=1)
    micro_batch_tokens: int = Field(8_192, ge=1)
    max_length: int = Field(2_048, ge=2)
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    lora: LoraShape | None = None
    """None trains all weights."""
    checkpoint_every_steps: int = Field(200, ge=1)
    seed: int = 0


class ModelStart(Settings):
    """Take a model (and perhaps an adapter) as it is. model: a directory or a hub id."""

    kind: Literal["model"]
    model: str
    revision: str | None = None
    adapter: str | None = None


class SftStart(Settings):
    """Run SFT on demonstrations first. demonstrations: JSONL of {"messages": [...]} ending with an assistant turn."""

    kind: Literal["sft"]
    model: str
    revision: str | None = None
    demonstrations: str
    sft: SftConfig


Start = Annotated[ModelStart | SftStart, Field(discriminator="kind")]
