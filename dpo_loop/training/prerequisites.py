"""What a training config asks of this machine, checked without loading anything heavy: before a round starts, and again by the stage."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from dpo_loop.config import TrainingConfig

_OLD_KEYS = ("fp16", "dynamo_backend")
"""Of earlier versions, which accelerate still reads."""


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
    """training.num_processes, or what the accelerate config says where that is 1. For one without `accelerate_problems`."""
    if config.num_processes == 1 and config.accelerate_config is not None:
        return int(_read(Path(config.accelerate_config)).get("num_processes", 1))
    return config.num_processes


def shards_base(config: TrainingConfig) -> bool:
    """Whether each process holds a part of the base only. For a config without `accelerate_problems`."""
    path = config.accelerate_config
    return path is not None and _read(Path(path)).get("distributed_type") == "FSDP" and num_processes_of(config) > 1


def _read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def _problems(found: dict[str, Any], config: TrainingConfig) -> Iterator[str]:
    from accelerate.commands.config.config_args import ClusterConfig  # imports torch: only where there is such a file

    known = {*ClusterConfig.__dataclass_fields__, *_OLD_KEYS}
    if unknown := sorted(str(key) for key in found if key not in known):
        yield f"unknown keys {', '.join(unknown)}; the accelerate that is installed would not start, take them out"
    if found.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        yield "compute_environment must be LOCAL_MACHINE: the stage starts the processes of its own machine only"
    if found.get("num_machines", 1) != 1:
        yield "num_machines must be 1: the stage starts the processes of its own machine only"
    kind, num = found.get("distributed_type"), found.get("num_processes", 1)
    if type(num) is not int or num < 1:
        yield f"num_processes is {num}; it must be a whole number from 1 up"
    elif kind == "NO" and (several := max(num, config.num_processes)) > 1:
        yield f"distributed_type NO starts one process, but num_processes is {several}; take MULTI_GPU (on a CPU too), or FSDP"
    if kind not in ("NO", "MULTI_GPU", "FSDP"):
        yield f"distributed_type is {kind}; it can be 'NO' (in quotes, else YAML reads False), MULTI_GPU or FSDP"
    if kind == "FSDP":
        yield from _shard_problems(found.get("fsdp_config") or {}, config)


def _shard_problems(shards: Any, config: TrainingConfig) -> Iterator[str]:
    if not isinstance(shards, dict):
        yield f"fsdp_config is {shards}; it must hold keys, as deploy/accelerate/fsdp2.yaml shows"
        return
    if shards.get("fsdp_version") != 2:
        yield "fsdp_version must be 2"
    if shards.get("fsdp_offload_params"):
        yield "fsdp_offload_params must be false; take more devices, or quantize_base on one"
    if shards.get("fsdp_cpu_ram_efficient_loading", True):
        yield "fsdp_cpu_ram_efficient_loading must be false: transformers then reads the weights in one process only"
    if config.quantize_base is not None:
        yield "a base in 4 bits is not sharded; leave out training.quantize_base, or take plain data parallel"
