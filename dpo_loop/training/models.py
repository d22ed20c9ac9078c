"""Base models and LoRA adapters in memory and on disk.

Numerics: on a CPU everything is fp32; on a GPU with dtype bfloat16 a frozen base is bf16 under autocast, adapters (and weights that
are themselves trained) stay fp32. One adapter in a model at a time: PEFT flips `requires_grad` when adapters are switched.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from dpo_loop.config import LoraShape
from dpo_loop.errors import InputError, PolicyError
from dpo_loop.files import write_json
from dpo_loop.policies import ADAPTER_ORIGIN, base_name
from dpo_loop.types import PolicyRef

disable_progress_bar()  # a stage's log is lines, not bars

NOT_ADAPTABLE = ("lm_head", "embed_tokens", "wte", "embed_out")
"""vLLM serves no LoRA on these with prompt log-probs (vllm#51594), and the completion-only head needs them frozen."""


def build_accelerator(dtype: str) -> Accelerator:
    """CUDA if there is any, else the CPU, and its autocast: bf16 only on CUDA and if `dtype` asks for it."""
    cuda = torch.cuda.is_available()
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if dtype == "bfloat16" and cuda else "no")


def load_base(path: str, *, accelerator: Accelerator, frozen: bool) -> Any:
    """The model in eval mode on the accelerator's device, without gradients if frozen."""
    config = AutoConfig.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        dtype=torch.bfloat16 if frozen and accelerator.mixed_precision == "bf16" else torch.float32,
        # transformers' sdpa silently drops the attention soft-cap of Gemma 2.
        attn_implementation="eager" if getattr(config, "attn_logit_softcapping", None) else "sdpa",
    )
    return model.requires_grad_(not frozen).eval().to(accelerator.device)


def load_policy(policy: PolicyRef, *, accelerator: Accelerator) -> Any:
    """Base plus adapter, if it has one; frozen."""
    base = load_base(policy.base, accelerator=accelerator, frozen=True)
    if policy.adapter is None:
        return base
    return PeftModel.from_pretrained(base, policy.adapter).requires_grad_(False).eval()


def add_adapter(base: Any, shape: LoraShape, *, seed: int) -> Any:
    """A fresh LoRA adapter: B is zero, so the model says what the base says."""
    targets: str | list[str] = shape.target
    if shape.target != "all-linear":
        targets = [name.strip() for name in shape.target.split(",")]
        if forbidden := sorted(set(targets) & set(NOT_ADAPTABLE)):
            raise InputError(
                f"lora.target names {', '.join(forbidden)}; the head and the embeddings cannot be adapted: leave them out"
            )
    torch.manual_seed(seed)
    config = LoraConfig(
        r=shape.rank, lora_alpha=shape.alpha, lora_dropout=shape.dropout, target_modules=targets, task_type="CAUSAL_LM"
    )
    try:
        return get_peft_model(base, config).eval()
    except ValueError as error:
        raise InputError(f"lora.target {shape.target!r} does not fit {base.config.name_or_path}: {error}") from error


def continue_adapter(base: Any, adapter: Path, *, dropout: float) -> Any:
    """The adapter of an earlier round, trainable; its rank, alpha and targets stay as they are."""
    config = PeftConfig.from_pretrained(adapter)
    config.lora_dropout = dropout
    return PeftModel.from_pretrained(base, adapter, config=config, is_trainable=True).eval()


def set_training_mode(model: Any, *, gradient_checkpointing: bool) -> None:
    """Dropout lives in LoRA layers only, and only if configured; everything else stays in eval mode, so policy = reference at step 0."""
    model.eval()
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "lora_dropout":
            module.train()
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # of this module alone: transformers checkpoints a layer only in training mode


def trainable_parameters(model: Any, *, adapter_only: bool) -> dict[str, torch.nn.Parameter]:
    """What the optimizer gets, by name. Raises PolicyError if anything else, or nothing, is trainable: PEFT flips `requires_grad` when adapters
    are switched or switched off."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if not adapter_only or ".lora_A." in name or ".lora_B." in name}
    if set(found) != wanted or not found:
        raise PolicyError(
            f"the trainable parameters are not what was asked for: missing {sorted(wanted - set(found))[:3]}, unexpected "
            f"{sorted(set(found) - wanted)[:3]}; this model does not work with LoRA training here"
        )
    return found


def save_adapter(model: Any, out: Path, *, policy: PolicyRef) -> None:
    """A PEFT adapter that vLLM loads: fp32 weights, config, and the base it belongs to.

    Written without PEFT's `save_pretrained`: its config lists the targets in an order that changes from process to process and holds the
    absolute path of the base, either of which would change the adapter's hash without changing the adapter.
    """
    out.mkdir()
    # Bytes first: a full disk is then an OSError, which materialize explains, and not one of safetensors.
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    payload = save({name: tensor.float().contiguous().cpu() for name, tensor in weights.items()})
    (out / "adapter_model.safetensors").write_bytes(payload)
    shape = {
        name: sorted(value) if isinstance(value, set) else value for name, value in model.peft_config["default"].to_dict().items()
    }
    shape |= {"base_model_name_or_path": base_name(policy.base), "inference_mode": True}
    write_json(out / "adapter_config.json", dict(sorted(shape.items())))
    write_json(out / ADAPTER_ORIGIN, {"base_sha256": policy.base_sha256})
