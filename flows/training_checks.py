"""What keeps the training that a config asks for from being done here, or its adapters from being served."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from dpo_loop.config import LoraShape, SftStart
from dpo_loop.training.prerequisites import accelerate_problems, tracker_problems
from dpo_loop.weights import NOT_ADAPTABLE
from flows.config import RunConfig


def training_problems(config: RunConfig) -> Iterator[str]:
    yield from _shape_problems(config, "training.lora", config.training.lora)
    if isinstance(config.start, SftStart) and config.start.sft.lora is not None:
        yield from _shape_problems(config, "start.sft.lora", config.start.sft.lora)
    if config.training.quantize_base is not None:
        yield from _quantization_problems(config)
    yield from accelerate_problems(config.training)
    if "train" not in config.stage_python:
        yield from tracker_problems(config.training.trackers)
    feedback = config.training.feedback
    if feedback is not None and not Path(feedback).is_file():
        yield f"training.feedback: {feedback} is not a file; give JSONL of messages and thumbs_up, or leave it out"


def _shape_problems(config: RunConfig, name: str, shape: LoraShape) -> Iterator[str]:
    limit = config.generation.engine.max_lora_rank
    if shape.rank > limit:
        yield f"{name}.rank: {shape.rank} is above the engine's limit {limit}; raise generation.engine.max_lora_rank or lower the rank"
    if shape.variant == "dora":
        yield (
            f"{name}.variant: dora is not served by vLLM, which every round's policy must be; take rslora or lora (a higher rank makes up for much "
            "of the difference)"
        )
    outer = [target.strip() for target in shape.target.split(",") if target.strip().rsplit(".", 1)[-1] in NOT_ADAPTABLE]
    if outer:
        yield f"{name}.target: {', '.join(outer)} cannot be adapted: no engine serves adapters of the head or the embeddings; leave them out"


def _quantization_problems(config: RunConfig) -> Iterator[str]:
    """Where the stage runs under an interpreter of its own, or another machine's scheduler starts it, its packages are its own affair."""
    if config.training.dtype != "bfloat16":
        yield "training.quantize_base: nf4 is computed in bfloat16; set training.dtype: bfloat16, or leave quantize_base out"
    if shutil.which("nvidia-smi") is None:
        yield "training.quantize_base: nf4 needs a CUDA GPU, and this machine has none (no nvidia-smi); leave quantize_base out"
    if "train" not in config.stage_python and find_spec("bitsandbytes") is None:
        yield "training.quantize_base: nf4 needs bitsandbytes; pip install bitsandbytes, or leave quantize_base out"
