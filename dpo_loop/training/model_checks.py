"""Models that must not be trained over without a word: incomplete, no numbers, not quantised as asked, or of another vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from dpo_loop.errors import InputError, PolicyError
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.weights import weight_files

_NUMBER = "N"
_BUFFERS = re.compile(
    r"(^|\.)(inv_freq|(cos|sin)_cached|causal_mask|masked_bias|attn\.bias|attention\.bias|position_ids|[kv]_scale)$"
)
"""What old checkpoints store beside their weights: frequencies, causal masks, positions."""


def check_can_quantize(accelerator: Accelerator) -> None:
    """bitsandbytes also computes on CPUs, but its kernels there drop the gradient of a model in eval mode without a word (seen in 0.50.2)."""
    missing = []
    if accelerator.device.type != "cuda":
        missing.append(f"a CUDA device (this trains on {accelerator.device.type})")
    if find_spec("bitsandbytes") is None:
        missing.append("bitsandbytes (pip install bitsandbytes)")
    if accelerator.mixed_precision != "bf16":
        missing.append("bf16 autocast (training.dtype: bfloat16 on CUDA)")
    if missing:
        raise InputError(
            f"training.quantize_base: nf4 needs {', '.join(missing)}; or leave the key out: the base is then not quantised"
        )


def check_quantized(model: Any, path: str) -> None:
    """T27: a quantisation that was asked for and quietly left out."""
    if not (getattr(model, "is_loaded_in_4bit", False) and any(type(p).__name__ == "Params4bit" for p in model.parameters())):
        raise PolicyError(
            f"{path} was not loaded in 4 bits, though training.quantize_base asks for it; leave the key out for this model"
        )


def check_complete(model: Any, loading: Mapping[str, Any], path: str) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers, leaves out those that config.json does not provide for, and
    says so in a warning."""
    for key, what in (("missing_keys", "lacks"), ("mismatched_keys", "has in another shape than config.json says")):
        if names := sorted(map(str, loading[key])):
            raise PolicyError(f"{path} {what} {', '.join(names[:3])} ({len(names)} tensors); copy the whole model again")
    if names := sorted(_left_out(model, loading["unexpected_keys"])):
        raise PolicyError(
            f"{path} holds {', '.join(names[:3])} ({len(names)} tensors), for which its config.json has no place: it says fewer layers, or other "
            "ones, than the weights are of. Copy config.json and the weights again from one and the same model"
        )


def _left_out(model: Any, unexpected: Iterable[str]) -> Iterator[str]:
    """Weights of a decoder's layer that the model does not have, or of a part that its own layers lack.

    Towers beside the decoder and heads that predict several tokens ahead (DeepSeek's are layers after the last one) may be left out.
    """
    known = {_numbered(name) for name, _ in model.named_modules() if name}
    config = model.config.get_text_config()
    first = config.num_hidden_layers
    ahead = {("layers", str(first + number)) for number in range(getattr(config, "num_nextn_predict_layers", None) or 0)}
    for name in unexpected:
        if _BUFFERS.search(name) or not ahead.isdisjoint(pairwise(name.split("."))):
            continue
        pieces = _numbered(name).split(".")
        around = [".".join(pieces[:end]) for end in range(1, len(pieces)) if end == len(pieces) - 1 or pieces[end - 1] == _NUMBER]
        if not known.isdisjoint([*around, *(f"{model.base_model_prefix}.{each}" for each in around)]):
            yield name


def _numbered(name: str) -> str:
    """The name of the same part of any layer."""
    return ".".join(_NUMBER if piece.isdigit() else piece for piece in name.split("."))


def stored_tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    for file in weight_files(path):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                yield name, weights.get_tensor(name)


def check_finite(tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
    """One tensor at a time; a sum is cheaper than a mask, and it is a number only if all summands are, or it overflowed."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.sum(dtype=torch.float32).isfinite():
            wrong = int((~tensor.isfinite()).sum())
            if wrong:
                raise PolicyError(
                    f"{where}: {wrong} of {tensor.numel()} weights in {name} are NaN or infinite; the files are damaged or the training that "
                    "made them diverged: copy them again or give an earlier model"
                )


def vocabulary_size(path: str) -> int:
    """Rows of the embedding, from config.json: ids below it are known to the model, perhaps more than the tokenizer's."""
    size: int = AutoConfig.from_pretrained(path).get_text_config().vocab_size
    return size


def check_token_ids(sequences: Sequence[TokenSequence], vocab_size: int, *, names: Sequence[str] | None = None) -> None:
    """Raises InputError, naming the sequence and the id, for a token that the model has no embedding for. names: None names by number."""
    for number, sequence in enumerate(sequences):
        name = f"sequence {number}" if names is None else names[number]
        for part, ids in zip(sequence._fields, sequence, strict=True):
            if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
                wrong = next(token for token in ids if not 0 <= token < vocab_size)
                raise InputError(
                    f"{name}: token id {wrong} in its {part} is not in the model's vocabulary of {vocab_size}; it was made with another "
                    "tokenizer: use the model's own, or resize the model's embeddings and save it again"
                )
