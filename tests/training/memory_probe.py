"""A child process: `python -m tests.training.memory_probe MODEL TOKENS CHECKPOINTING` prints how much one pass made it grow, and what autograd kept."""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

from dpo_loop.config import LoraShape
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, set_training_mode, trainable_parameters

PROMPT, COMPLETION = 128, 64
TOKENS_OF_A_PAIR = PROMPT + 2 * (COMPLETION - 1)


def main(path: str, num_pairs: int, checkpointing: bool) -> dict[str, Any]:
    accelerator = build_accelerator("float32")
    model = add_adapter(load_base(path, accelerator=accelerator, frozen=True), LoraShape(), seed=0)
    set_training_mode(model, gradient_checkpointing=checkpointing)
    scorer = build_scorer(model, device=accelerator.device, forward="auto")
    optimizer = torch.optim.AdamW(trainable_parameters(model, adapter_only=True).values(), fused=True)
    sequences = _pairs(num_pairs, vocabulary=model.config.vocab_size)
    # What is allocated once: moments, buffers of kernels.
    scorer(sequences[:1]).logps_N.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    kept: dict[int, int] = {}
    weights = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps_N = scorer(sequences).logps_N
    logps_N.sum().backward()  # type: ignore[no-untyped-call]
    return {"packed": scorer.packed, "kept_bytes": sum(kept.values()), "growth_bytes": _status("VmHWM") - before}


def _pairs(num: int, *, vocabulary: int) -> list[TokenSequence]:
    draw = random.Random(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(length))

    return [TokenSequence(prompt, ids(COMPLETION)) for prompt in (ids(PROMPT) for _ in range(num)) for _ in range(2)]


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), sys.argv[3] == "True")))
