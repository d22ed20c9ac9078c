"""What safetensors files say about themselves, read from their headers: whether they are whole, and which tensors of which type they hold.

A header is a length and a JSON object, so looking costs nothing and needs no torch, however large the model is.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NOT_ADAPTABLE = ("lm_head", "embed_tokens", "wte", "embed_out", "embed_in")
"""vLLM serves no LoRA on these with prompt log-probs (vllm#51594), and the completion-only head needs them frozen."""

_LORA_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")
_FLOATS = ("F32", "BF16", "F16")
_MAX_HEADER_BYTES = 100_000_000


class StoredTensor(NamedTuple):
    dtype: str
    """As safetensors spells it: F32, BF16, F8_E4M3, I8 …"""
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Name, type and shape of every tensor in a file. Raises ValueError, saying why, for a file that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        opening = file.read(8)
        length = struct.unpack("<Q", opening)[0] if len(opening) == 8 else _MAX_HEADER_BYTES + 1
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError("it is not a safetensors file (a Git LFS pointer, or cut off)")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    header.pop("__metadata__", None)
    try:
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {name: StoredTensor(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("its header does not describe tensors") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes where its header promises {8 + length + end}")
    return tensors


def weight_files(base: Path) -> list[Path]:
    """The files that transformers loads: those of the index, else the one of a small model. Whatever else lies there is not the model's."""
    index, single = base / "model.safetensors.index.json", base / "model.safetensors"
    if index.is_file():
        return [base / name for name in sorted(set(json.loads(index.read_bytes())["weight_map"].values()))]
    return [single] if single.is_file() else sorted(base.glob("*.safetensors"))


def base_weight_problems(base: Path, config: Mapping[str, Any]) -> list[str]:
    """What keeps the weights of a model directory from being trained over: damaged files, weights that are not plain floats. config: its config.json."""
    method = config.get("quantization_config")
    if method is not None:
        named = method.get("quant_method", "quantised") if isinstance(method, dict) else "quantised"
        return [
            f"{base} is quantised ({named}); give the model in bfloat16 or float32. For training in 4 bits: training.quantize_base: nf4"
        ]
    problems = []
    for path in weight_files(base):
        try:
            tensors = read_header(path)
        except ValueError as error:
            problems.append(_damaged(path, error))
            continue
        odd = {name: tensor.dtype for name, tensor in tensors.items() if _is_odd(name, tensor)}
        if odd:
            name, dtype = next(iter(odd.items()))
            problems.append(
                f"{path} holds {name} as {dtype} ({len(odd)} such tensors); weights must be float32, bfloat16 or float16: load the model "
                "with dtype=torch.bfloat16 and save it again with `save_pretrained`"
            )
    return problems


def _is_odd(name: str, tensor: StoredTensor) -> bool:
    """Whole numbers may be buffers, such as the position ids of old checkpoints; a weight is never one."""
    if tensor.dtype in _FLOATS:
        return False
    return tensor.dtype.startswith("F") or name.endswith("weight")


def adapter_weight_problems(path: Path, config: Mapping[str, Any]) -> list[str]:
    """What keeps adapter_model.safetensors from being what its config says: a LoRA adapter of rank r, and nothing else. config: adapter_config.json."""
    try:
        tensors = read_header(path)
    except ValueError as error:
        return [_damaged(path, error)]
    if not tensors:
        return [f"{path} holds no tensors; save the adapter again with `save_pretrained`"]
    return [*_unfit_tensors(path, tensors), *_wrong_ranks(path, tensors, config.get("r"))]


def _unfit_tensors(path: Path, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    foreign = [name for name in tensors if not name.endswith(_LORA_PARTS)]
    if foreign:
        yield (
            f"{path} holds {foreign[0]}, which is not a LoRA weight of a linear layer ({len(foreign)} such tensors); trained embeddings, "
            "heads and other modules are not served with an adapter: merge it into its base and give that as the model"
        )
    if outer := {module for module in map(module_of, tensors) if module.rsplit(".", 1)[-1] in NOT_ADAPTABLE}:
        yield (
            f"{path} adapts {', '.join(sorted(outer))}; the head and the embeddings cannot be adapted: merge it into its base and give "
            "that as the model, or train an adapter of the inner linear layers"
        )
    if odd := {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype not in _FLOATS}:
        name, dtype = next(iter(odd.items()))
        yield f"{path} holds {name} as {dtype}; an adapter's weights must be float32, bfloat16 or float16: cast them and save it again"
    halves = {part: {module_of(name) for name in tensors if name.endswith(part)} for part in _LORA_PARTS[:2]}
    if single := sorted(halves[".lora_A.weight"] ^ halves[".lora_B.weight"]):
        yield f"{path} holds only one of lora_A and lora_B for {single[0]}; copy the adapter again"


def _wrong_ranks(path: Path, tensors: Mapping[str, StoredTensor], rank: Any) -> Iterator[str]:
    ranks = {name: tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight") and tensor.shape}
    ranks |= {
        name: tensor.shape[1] for name, tensor in tensors.items() if name.endswith(".lora_B.weight") and len(tensor.shape) > 1
    }
    if wrong := {name: found for name, found in ranks.items() if found != rank}:
        name, found = next(iter(wrong.items()))
        yield (
            f"{path} holds {name} of rank {found}, but its adapter_config.json says r = {rank}; weights and config belong to different "
            "adapters: copy both again from where they came from"
        )


def module_of(name: str) -> str:
    """The module that a tensor of an adapter belongs to, as the model names it."""
    return name.removeprefix("base_model.model.").split(".lora_")[0]


def _damaged(path: Path, error: ValueError) -> str:
    return f"{path} is damaged: {error}; copy it again from where the model came from"
