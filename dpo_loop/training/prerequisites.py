"""What a training config asks of this machine, checked without loading anything heavy: before a round starts, and again by the stage."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from dpo_loop.config import TrainingConfig


def tracker_problems(names: Sequence[str]) -> list[str]:
    """One line for each tracker whose package is not installed, with the way to install it."""
    return [
        f"training.trackers: {name} is not installed; `pip install {name}`, or take it off the list"
        for name in names
        if find_spec(name) is None
    ]


def accelerate_problems(config: TrainingConfig) -> list[str]:
    """What of training.accelerate_config cannot be done here, a line each."""
    if config.accelerate_config is None:
        return []
    path = Path(config.accelerate_config)
    where = f"training.accelerate_config: {path}"
    try:
        found = _read(path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        return [f"{where} cannot be read ({reason}); `accelerate config --config_file FILE` writes one"]
    if not isinstance(found, dict):
        return [f"{where} holds no keys; `accelerate config --config_file FILE` writes one"]
    return [f"{where}: {problem}" for problem in _problems(found, config)]


def num_processes_of(config: TrainingConfig) -> int:
    """training.num_processes, or what the accelerate config says where that is 1."""
    if config.num_processes == 1 and config.accelerate_config is not None:
        return int(_read(Path(config.accelerate_config)).get("num_processes", 1))
    return config.num_processes


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _problems(found: dict[str, Any], config: TrainingConfig) -> list[str]:
    kind, problems = found.get("distributed_type"), []
    if kind not in ("NO", "MULTI_GPU", "FSDP"):
        problems.append(f"distributed_type is {kind}; it can be NO, MULTI_GPU or FSDP")
    if found.get("num_machines", 1) != 1:
        problems.append("num_machines must be 1: the stage starts the processes of its own machine only")
    if kind == "FSDP":
        shards = found.get("fsdp_config") or {}
        if shards.get("fsdp_version") != 2:
            problems.append("fsdp_version must be 2")
        if shards.get("fsdp_offload_params"):
            problems.append("fsdp_offload_params must be false; take more devices, or quantize_base on one")
        if shards.get("fsdp_cpu_ram_efficient_loading", True):
            problems.append("fsdp_cpu_ram_efficient_loading must be false: transformers then reads the weights in one process only")
        if config.quantize_base is not None:
            problems.append("a base in 4 bits is not sharded; leave out training.quantize_base, or take plain data parallel")
    return problems
