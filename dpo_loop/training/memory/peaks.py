"""How much memory there is, and how much was used at most."""

from __future__ import annotations

import resource

import torch

from dpo_loop.training.memory.plan import machine_bytes


def memory_limit_bytes(device: torch.device, *, num_processes: int) -> int:
    """What one of the processes may use: of a GPU all that this process is allowed, of a machine its share.

    Totals, not what is free at the moment: a plan made from it is the same when training resumes.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(device))
    return machine_bytes() // num_processes


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process used so far: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
