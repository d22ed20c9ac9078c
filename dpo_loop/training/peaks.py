"""How much memory there is, and how much was used at most."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import torch

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def memory_limit_bytes(device: torch.device, *, num_processes: int) -> int:
    """What one of the processes may use: of a GPU all that this process is allowed, of a machine its share.

    Totals, not what is free at the moment: a plan made from it is the same when training resumes.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return int(total * torch.cuda.get_per_process_memory_fraction(device))
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if _CGROUP_LIMIT.is_file() and (limit := _CGROUP_LIMIT.read_text().strip()).isdigit():
        total = min(total, int(limit))
    return total // num_processes


def peak_memory_bytes(device: torch.device) -> int:
    """The most that this process used so far: of the GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
