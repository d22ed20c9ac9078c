"""How a policy answers, and which of its answers become pairs."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dpo_loop.config.base import Fraction, Settings


class EngineConfig(Settings):
    """How vLLM is run. None of it changes what is sampled in distribution."""

    not_in_key: ClassVar[frozenset[str]] = frozenset(
        {"gpu_memory_utilization", "cpu_kvcache_gib", "max_num_seqs", "canary_tolerance"}
    )
    kind: Literal["vllm_offline"]
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int = Field(2_048, ge=16)
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 64
    tensor_parallel: int = Field(1, ge=1)
    gpu_memory_utilization: Fraction = 0.9
    cpu_kvcache_gib: int = Field(1, ge=1)
    max_num_seqs: int = Field(256, ge=1)
    enforce_eager: bool = False
    canary_tolerance: float = Field(5e-2, gt=0)
    """Largest mean absolute difference, nats per token, between the engine's log-probs and transformers+peft's."""


class GenerationConfig(Settings):
    engine: EngineConfig
    k: int = Field(4, ge=1)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    max_new_tokens: int = Field(1_024, ge=1)
    shard_size: int = Field(256, ge=1)
    """Prompts per shard: the unit of resume."""


class PairingConfig(Settings):
    min_margin: Fraction = 0.2
    """A pair needs |2p - 1| of at least this."""
    max_length_ratio: float = Field(4.0, ge=1)
    """Longer over shorter completion, in tokens, above which a pair is dropped."""
    drop_truncated: bool = True
    min_pairs: int = Field(1, ge=1)
    """Fewer pairs than this make the round INVALID."""
