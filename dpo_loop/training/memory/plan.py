"""How much memory training needs, from a model's config.json and the training config: no torch, so that `dpo-loop estimate` is quick.

What is kept for backward is counted tensor by tensor, as a decoder layer with our forwards (lora_linear.py, gated_mlp.py, tree_attention.py,
head.py) keeps it: byte for byte what autograd says it saved. On a CPU, what a process then grew by is within a quarter of the figures here for models
worth planning. Bytes of a GPU follow from the same count at the widths of its types, and were not measured. Symbols: H hidden size, Q and K widths of queries and keys, I inner size of the MLP.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpo_loop.config import KtoLoss, TrainingConfig
from dpo_loop.training.memory.shape import ModelShape, read_shape
from dpo_loop.training.prerequisites import shards_base
from dpo_loop.types import Record

REFERENCE_BATCHES = 2
"""Reference batches are this many times larger than training's: they keep no activations."""
MOST_TOKENS = {"cpu": 8_192, "cuda": 16_384}
"""An automatic budget is not larger: beyond it no pass becomes faster."""
_USABLE = {"cpu": 0.8, "cuda": 0.9}
"""Of the limit: the rest is for the machine's other processes, on a GPU for what its allocator cannot join."""
_HELD = {"cpu": {False: 1.15, True: 2.2}, "cuda": {False: 1.0, True: 1.0}}
"""What an allocator holds for every byte in use, without and with checkpointing: glibc gives holes between tensors back late, and recomputed
layers leave many. Measured on Llamas of 6M to 88M parameters: 0.83 to 1.26 without, 1.9 to 2.7 with."""
_RUNTIME_BYTES = {"cpu": 450 << 20, "cuda": 800 << 20}
"""Python with torch and transformers; the context of CUDA, its kernels and cuBLAS' workspace."""
_CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}
_CHUNK_ROWS = 64
"""Of the head, as head.py cuts it."""
_OPTIMIZER_BYTES = 16
"""Of an adapter's weight: itself, its gradient and AdamW's two moments, fp32."""
_NF4_BYTES = 0.56
"""Half a byte, and a scale for every 64 weights that is itself in 8 bits, with rounding up."""
_STEP_TOKENS = 256


_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


class MemoryPlan(Record):
    """Bytes at the peak of one process. limit_bytes: what there is; None where nobody knows."""

    weights_bytes: int
    adapter_bytes: int
    """Adapter weights, their gradients and AdamW's two moments, fp32."""
    activations_bytes: int
    """What backward needs, and the gradients of the layer that it is at; or the reference's pass, where that is more."""
    head_bytes: int
    runtime_bytes: int = 0
    """Python and its libraries, or what CUDA takes before a model is there."""
    total_bytes: int
    limit_bytes: int | None
    micro_batch_tokens: int
    gradient_checkpointing: bool
    fits: bool
    """In the share of the limit that can be used."""
    notes: tuple[str, ...] = ()
    """What was guessed, or is not in the figures."""


def machine_bytes() -> int:
    """Of this machine's memory, or of the container's share of it. What there is, not what is free now: a plan is the same when training resumes."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total


def plan_memory(
    base: Path, config: TrainingConfig, *, device: str, limit_bytes: int | None, longest_tokens: int | None = None
) -> MemoryPlan:
    """device: "cpu" or "cuda". What the config leaves to `auto` is chosen: no checkpointing if it fits, then the largest token budget that fits.

    limit_bytes: of one process. longest_tokens: of the longest example, which no cut makes smaller; None takes a pair of max_length.
    Raises PolicyError if the model's config.json does not say how large it is.
    """
    return plan_for(read_shape(base), config, device=device, limit_bytes=limit_bytes, longest_tokens=longest_tokens)


def plan_for(
    shape: ModelShape, config: TrainingConfig, *, device: str, limit_bytes: int | None, longest_tokens: int | None = None
) -> MemoryPlan:
    """As plan_memory, for a shape that has been read."""
    if longest_tokens is None:
        longest_tokens = config.max_length if isinstance(config.loss, KtoLoss) else 2 * config.max_length
    need = _Need(shape, config, device)
    usable = None if limit_bytes is None else int(_USABLE[device] * limit_bytes)
    asked, auto = config.micro_batch_tokens, config.gradient_checkpointing
    least = longest_tokens if asked == "auto" else max(asked, longest_tokens)
    choices = (False, True) if auto == "auto" else (auto,)
    checkpointing = next((each for each in choices if usable is None or need.total(least, each) <= usable), choices[-1])
    tokens = least
    if asked == "auto":
        most = max(least, MOST_TOKENS[device])
        budgets = range(most - most % _STEP_TOKENS, least, -_STEP_TOKENS)
        tokens = next((each for each in budgets if usable is None or need.total(each, checkpointing) <= usable), least)
    return MemoryPlan(
        weights_bytes=need.weights,
        adapter_bytes=need.adapter,
        activations_bytes=need.activations(tokens, checkpointing),
        head_bytes=need.head(tokens),
        runtime_bytes=_RUNTIME_BYTES[device],
        total_bytes=need.total(tokens, checkpointing),
        limit_bytes=limit_bytes,
        micro_batch_tokens=tokens if asked == "auto" else asked,
        gradient_checkpointing=checkpointing,
        fits=usable is None or need.total(tokens, checkpointing) <= usable,
        notes=(*shape.notes, *need.notes()),
    )


@dataclass(frozen=True)
class _Need:
    """Bytes that a training takes, as functions of the tokens of its largest micro-batch."""

    shape: ModelShape
    config: TrainingConfig
    device: str

    def total(self, tokens: int, checkpointing: bool) -> int:
        parts = (self.weights, self.adapter, self.activations(tokens, checkpointing), self.head(tokens))
        return sum(parts) + _RUNTIME_BYTES[self.device]

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.device == "cuda" and self.config.dtype == "bfloat16" else 4

    @property
    def weights(self) -> int:
        num = self.shape.num_parameters
        if self.config.quantize_base is None:
            return num * self.width
        packed = sum(rows * columns for rows, columns in self.shape.linears().values())
        return round(packed * _NF4_BYTES) + (num - packed) * self.width

    @property
    def adapter(self) -> int:
        lora = self.config.lora
        linears = self.shape.linears(lora.target).values()
        magnitudes = sum(num_out for _, num_out in linears) if lora.variant == "dora" else 0
        return _OPTIMIZER_BYTES * (sum((num_in + num_out) * lora.rank for num_in, num_out in linears) + magnitudes)

    def activations(self, tokens: int, checkpointing: bool) -> int:
        shape = self.shape
        kept = self._layer() + self._attention_maps()
        layers = shape.num_layers * shape.hidden * self.width + kept if checkpointing else shape.num_layers * kept
        # One layer on the way back: gradients of two of the MLP's tensors, and two that it did not keep; two of the residual's.
        passing = self.width * ((4 if self._recomputes_mlp else 2) * self._inner + 2 * shape.hidden)
        outside = 4 * shape.hidden * self.width  # embedding, final norm and what goes into the head
        reference = self.width * (4 * shape.hidden + 3 * self._inner) + self._attention_maps()
        held = _HELD[self.device][checkpointing]
        return round(held * tokens * max(layers + passing + outside, REFERENCE_BATCHES * reference)) + self._unpacked()

    def head(self, tokens: int) -> int:
        """As if all tokens were scored: what goes in, the direction of its gradient, the gradient; one chunk of logits."""
        row_bytes = 4 * self.shape.vocabulary
        chunk_bytes = min(max(_CHUNK_ROWS * row_bytes, _CHUNK_BYTES[self.device]), tokens * row_bytes)
        return 3 * tokens * self.shape.hidden * self.width + 3 * chunk_bytes

    def notes(self) -> list[str]:
        found = []
        if self.device == "cuda":
            found.append("no GPU was measured for these figures: they follow from the same count as those of a CPU, which were")
        if shards_base(self.config):
            found.append(f"what {self.config.accelerate_config} shards is counted as if every process held all of it")
        return found

    @property
    def _inner(self) -> int:
        """Of all experts that a token goes through."""
        return self.shape.intermediate * self.shape.experts_per_token

    @property
    def _peft_forwards(self) -> bool:
        """Whether no LoRA layer is a plain one (lora_linear.py)."""
        lora = self.config.lora
        return bool(lora.dropout) or lora.variant == "dora" or self.config.quantize_base is not None

    @property
    def _recomputes_mlp(self) -> bool:
        """Whether gated_mlp.py computes the MLP; it does not know a sharded one."""
        adapted = {name.split(".")[-1] for name in self.shape.linears(self.config.lora.target)}
        return (
            self.shape.gated
            and {"gate_proj", "up_proj", "down_proj"} <= adapted
            and not self._peft_forwards
            and not shards_base(self.config)
        )

    def _layer(self) -> float:
        """Bytes per token that one layer keeps for backward, without attention maps."""
        shape, config = self.shape, self.config
        queries, keys = shape.num_heads * shape.head_size, shape.num_kv_heads * shape.head_size
        # transformers' norms compute, and keep, fp32.
        norms = 4 * (shape.norm_elements() or 2 * shape.hidden)
        # What goes into the projections and the MLP, once each; queries, keys, values and output of attention. Variable-length
        # attention of a GPU keeps keys and values of a shared prompt for each of its branches.
        attention = 2 * shape.hidden + 2 * queries + (4 if self.device == "cuda" else 2) * keys
        mlp = (2 if self._recomputes_mlp else 4 if shape.gated else 6 if shape.composed_activation else 2) * self._inner
        if shape.experts_per_token > 1:
            mlp += 2 * shape.experts_per_token * shape.hidden  # a token's copy for each of its experts, in and out
        linears = shape.linears(config.lora.target).values()
        per_layer = 1 / shape.num_layers
        lora = len(linears) * config.lora.rank * per_layer
        if self._peft_forwards:
            # PEFT's own forward: a copy of every input, its dropped-out twin with a mask, and DoRA's two outputs.
            inputs, outputs = (sum(size[side] for size in linears) * per_layer for side in (0, 1))
            lora += inputs * (2.25 if config.lora.dropout else 1) + (2 * outputs if config.lora.variant == "dora" else 0)
        return norms + self.width * (attention + mlp + lora)

    def _attention_maps(self) -> float:
        """Bytes per token where a layer's attention is written out: capped scores, probabilities in fp32 and rounded."""
        return self.shape.num_heads * self.config.max_length * (2 * self.width + 4) if self.shape.eager_attention else 0.0

    def _unpacked(self) -> int:
        """The largest weight in full, where a layer needs that to compute: unpacked from 4 bits, or with its adapter for DoRA's norm."""
        largest = max((num_in * num_out for num_in, num_out in self.shape.linears().values()), default=0)
        needed = (self.config.quantize_base is not None) + 2 * (self.config.lora.variant == "dora")
        return needed * largest * self.width
