"""A base in shards over the processes (PyTorch FSDP2), for one that does not fit on each device: asked for by a file of `accelerate config`.

Only frozen weights are in shards: each process keeps a part of every layer and gathers a layer when it is computed. Adapters, which
are small, stay whole in every process, so that gradients, optimizer, checkpoints and the published adapter are those of plain data parallel.
The head stays whole too (and the embedding, where it is the same weights), so that every forward of a Scorer works. `fully_shard` is
called here and not through `Accelerator.prepare`, which shards adapters and knows no CPU, on which this is tested.
"""

from __future__ import annotations

import os
from typing import Any

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dpo_loop.errors import InputError
from dpo_loop.training.forward.logprobs import bare_model


def wants_shards(accelerator: Any) -> bool:
    """Whether the launcher was given an accelerate config that says FSDP, and there is more than one process."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def shard_base(model: Any, accelerator: Any) -> None:
    """Bring a model that lies on the CPU, with or without an adapter, to the device in shards. Raises InputError for one whose layers are
    not known."""
    bare = bare_model(model)
    layers = [module for module in bare.base_model.modules() if type(module).__name__ in (bare._no_split_modules or ())]
    if not layers:
        raise InputError(
            f"{type(bare).__name__} does not say what its layers are, so it cannot be sharded; take an accelerate config without FSDP"
        )
    whole = {parameter for name, parameter in model.named_parameters() if parameter.requires_grad or ".lora_" in name}
    whole |= set(bare.get_output_embeddings().parameters())
    for tensor in (*whole, *model.buffers()):
        tensor.data = tensor.data.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=whole)
    fully_shard(bare.base_model, mesh=mesh, ignored_params=whole)


def free_gathered(model: Any) -> None:
    """Let go of what the last forward gathered and kept. Reading a model's state dict does so in one process, and then all must."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
