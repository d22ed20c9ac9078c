"""Which layers of a base a LoRA adapter adapts: linear ones of the language model that PEFT adapts as such and an engine serves by module."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.pytorch_utils import Conv1D

from dpo_loop.config import LoraShape
from dpo_loop.errors import InputError
from dpo_loop.weights import NOT_ADAPTABLE

_LINEAR = (torch.nn.Linear, Conv1D)
_NAMES_OF_FUSED_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "shared_expert_gate"}
_MAMBAS = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}
"""Their kernels take the weights of `out_proj` and `dt_proj` past an adapter, which would learn nothing."""


def target_names(base: Any, target: str) -> list[str]:
    """What PEFT gets as `target_modules`. Raises InputError for names that the base does not have or that cannot be adapted."""
    return _linear_layers(base) if target == "all-linear" else _named_targets(base, target)


def outside_language_model(base: Any) -> str | None:
    """A pattern of the modules beside the decoder of a multimodal model, which text does not reach; None where there are none.

    A target by its last name, `q_proj`, would otherwise be found in a vision tower, too.
    """
    decoder, head = base.get_decoder(), base.get_output_embeddings()
    inside = next(name for name, module in base.named_modules() if module is decoder)
    module, path, beside = base, "", []
    for part in filter(None, inside.split(".")):
        children = {name: child for name, child in module.named_children() if name != part and child is not head}
        beside += [path + name for name, child in children.items() if any(isinstance(each, _LINEAR) for each in child.modules())]
        module, path = getattr(module, part), f"{path}{part}."
    return rf"(?:{'|'.join(map(re.escape, beside))})(?:\..*)?" if beside else None


def check_layers(model: Any, shape: LoraShape) -> None:
    """Raises InputError, by name, for adapted layers that compute more than a product, or have fewer dimensions than the adapter's rank."""
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer.base_layer, torch.nn.Linear) and not _is_plain(layer.base_layer):
            raise InputError(
                f"lora.target {shape.target!r} adapts {name}, a {type(layer.base_layer).__name__}, which returns more than the output of a "
                "linear layer: leave it out"
            )
        if shape.rank > min(layer.in_features, layer.out_features):
            raise InputError(
                f"lora.rank {shape.rank} is more than {name} can have, which makes {layer.out_features} outputs of {layer.in_features} inputs: "
                f"lower it to {min(layer.in_features, layer.out_features)}, or name in lora.target only larger layers"
            )


def _linear_layers(base: Any) -> list[str]:
    """Last parts of the names of all linear layers but the head, less those that PEFT would take for something else.

    Experts fused into one parameter and their routers are no linear layers: PEFT adapts them by wrappers that no engine serves by module. It
    takes a dense layer named as an expert's once was for the experts, too, so of a mixture of experts it is the attention that is adapted.
    """
    head, outside = base.get_output_embeddings(), outside_language_model(base)
    found = {
        name.rsplit(".", 1)[-1]
        for name, module in base.named_modules()
        if _is_plain(module) and module is not head and not (outside and re.fullmatch(outside, name))
    }
    if any(name.endswith(".experts.down_proj") for name, _ in base.named_parameters()):
        found -= _NAMES_OF_FUSED_EXPERTS
    if base.config.model_type in _MAMBAS:
        found -= {"out_proj", "dt_proj"}
    return sorted(found)


def _is_plain(module: Any) -> bool:
    """Subclasses of a linear layer may be one (Falcon's, bitsandbytes') or not (routers of Llama 4 and PhiMoE return tuples): it is tried."""
    if type(module) in _LINEAR:
        return True
    if not isinstance(module, torch.nn.Linear):
        return False
    weight = module.weight
    inputs = torch.zeros(1, module.in_features, device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)
    try:
        with torch.no_grad():
            output = module(inputs)
    except Exception:  # its input is of another shape, or not all that it takes
        return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)


def _named_targets(base: Any, target: str) -> list[str]:
    names = [name.strip() for name in target.split(",") if name.strip()]
    if not names:
        raise InputError(
            f"lora.target {target!r} names nothing; its linear layers are {', '.join(_linear_layers(base))}: name some, or all-linear"
        )
    if forbidden := sorted({name for name in names if name.rsplit(".", 1)[-1] in NOT_ADAPTABLE}):
        raise InputError(f"lora.target names {', '.join(forbidden)}; the head and the embeddings cannot be adapted: leave them out")
    outside = outside_language_model(base)
    modules = [name for name, _ in base.named_modules() if not (outside and re.fullmatch(outside, name))]
    missing = [name for name in names if not any(module == name or module.endswith(f".{name}") for module in modules)]
    if missing:
        raise InputError(
            f"lora.target names {', '.join(missing)}, which {base.config.name_or_path} does not have; its linear layers are "
            f"{', '.join(_linear_layers(base))}"
        )
    return names
