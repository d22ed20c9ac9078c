"""Base models and LoRA adapters in memory and on disk.

Numerics: on a CPU everything is fp32; on a GPU with dtype bfloat16 a frozen base is bf16 (or, for QLoRA, 4 bits computed in bf16) under
autocast; adapters, and weights that are themselves trained, are always fp32. One adapter in a model at a time: PEFT flips
`requires_grad` when adapters are switched. A base or an adapter that PEFT or transformers would load with a warning is refused here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from dpo_loop.config import LoraShape
from dpo_loop.errors import InputError, PolicyError
from dpo_loop.files import write_json
from dpo_loop.policies import ADAPTER_ORIGIN, base_name
from dpo_loop.training.dropout import without_dropout
from dpo_loop.training.lora_targets import check_layers, outside_language_model, target_names
from dpo_loop.training.model_checks import check_can_quantize, check_complete, check_finite, check_quantized, stored_tensors
from dpo_loop.training.sharding import shard_base, wants_shards
from dpo_loop.types import PolicyRef

disable_progress_bar()  # a stage's log is lines, not bars

Quantization = Literal["nf4"]
_ADAPTER_PARTS = (".lora_A.", ".lora_B.", ".lora_magnitude_vector.")


def build_accelerator(dtype: str) -> Accelerator:
    """CUDA if there is any, else the CPU, and its autocast: bf16 only on CUDA and if `dtype` asks for it."""
    cuda = torch.cuda.is_available()
    return Accelerator(cpu=not cuda, mixed_precision="bf16" if dtype == "bfloat16" and cuda else "no")


def load_base(path: str, *, accelerator: Accelerator, frozen: bool, quantize_base: Quantization | None = None) -> Any:
    """The model in eval mode on the accelerator's device, without gradients if frozen.

    quantize_base: the linear layers but the head in 4 bits (QLoRA, arXiv 2305.14314), only for a frozen base. Raises InputError where
    that cannot be computed, PolicyError for weights that are missing, of a wrong shape, or no numbers.
    """
    # One of its own: models that share a config switch one another's attention (T33).
    config = without_dropout(AutoConfig.from_pretrained(path))
    half = frozen and accelerator.mixed_precision == "bf16"
    arguments: dict[str, Any] = {
        "config": config,
        "dtype": torch.bfloat16 if half else torch.float32,
        # transformers' sdpa silently drops the attention soft-cap of Gemma 2 (T34). None: sdpa where the model has it.
        "attn_implementation": "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None,
    }
    if quantize_base is not None:
        assert frozen
        check_can_quantize(accelerator)
        arguments |= {"quantization_config": _nf4(), "device_map": {"": accelerator.device}}
    model, loading = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **arguments)
    check_complete(model, loading, path)
    if quantize_base is None:
        if not wants_shards(accelerator):  # else no device may have to hold all of it, and shard_base brings it there
            model = model.to(accelerator.device)
        check_finite(model.named_parameters(), path)
    else:
        check_quantized(model, path)
        check_finite(stored_tensors(Path(path)), path)
    return model.requires_grad_(not frozen).eval()


def _nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_policy(policy: PolicyRef, *, accelerator: Accelerator, quantize_base: Quantization | None = None) -> Any:
    """Base plus adapter, if it has one; frozen. Raises as `load_base` and `continue_adapter` do."""
    model = load_base(policy.base, accelerator=accelerator, frozen=True, quantize_base=quantize_base)
    if policy.adapter is not None:
        adapter = Path(policy.adapter)
        model = _load_adapter(model, adapter, PeftConfig.from_pretrained(adapter), trainable=False).requires_grad_(False)
    if wants_shards(accelerator):
        shard_base(model, accelerator)
    return model


def add_adapter(base: Any, shape: LoraShape, *, seed: int) -> Any:
    """A fresh LoRA adapter: B is zero, so the model says what the base says.

    rsLoRA: arXiv 2312.03732; DoRA: arXiv 2402.09353. Raises InputError for targets that the model does not have or that cannot be adapted, and
    for a rank that does not fit them.
    """
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=target_names(base, shape.target),
        exclude_modules=outside_language_model(base),
        task_type="CAUSAL_LM",
        use_rslora=shape.variant == "rslora",
        use_dora=shape.variant == "dora",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in base.modules()),  # GPT-2 stores its weights transposed
    )
    torch.manual_seed(seed)
    try:
        model = get_peft_model(base, config).eval()
    except ValueError as error:
        raise InputError(f"lora.target {shape.target!r} does not fit {base.config.name_or_path}: {error}") from error
    model = _checked(model, f"lora.target {shape.target!r}")
    check_layers(model, shape)
    return model


def continue_adapter(base: Any, adapter: Path, *, dropout: float) -> Any:
    """The adapter of an earlier round, trainable; its variant, rank, alpha and targets stay as they are.

    Raises PolicyError for one that does not fit the base, is not wholly loaded, or holds weights that are no numbers.
    """
    config = PeftConfig.from_pretrained(adapter)
    config.lora_dropout = dropout
    return _load_adapter(base, adapter, config, trainable=True)


def _load_adapter(base: Any, adapter: Path, config: Any, *, trainable: bool) -> Any:
    stored = load_file(adapter / "adapter_model.safetensors")
    check_finite(stored.items(), adapter)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys", category=UserWarning)  # an error, below
            model = PeftModel.from_pretrained(base, adapter, config=config, is_trainable=trainable).eval()
    except torch.OutOfMemoryError:
        raise
    except (ValueError, RuntimeError) as error:  # no module of that name; a tensor of another shape
        reasons = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in reasons if line.startswith("size mismatch")), reasons[0]).rstrip(".")
        raise PolicyError(f"{adapter} does not fit {base.config.name_or_path}: {reason}. Give the adapter of this base") from error
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    if odd := sorted(stored.keys() ^ loaded.keys()):
        raise PolicyError(
            f"{adapter} does not fit {base.config.name_or_path}: {odd[0]} is only in the {'file' if odd[0] in stored else 'model'} ({len(odd)} such "
            "tensors). Give the adapter of this base, or copy it again"
        )
    if different := [name for name, tensor in stored.items() if not torch.equal(tensor.float(), loaded[name].float().cpu())]:
        raise PolicyError(
            f"{adapter} was not loaded as it is: {different[0]} differs in the model; this adapter cannot be used here"
        )
    return _checked(model, str(adapter))


def _checked(model: Any, what: str) -> Any:
    """A model whose adapter is one that training, engines and the completion-only head agree on; all of its weights fp32."""
    bare = model.get_base_model()
    outer = [module for module in (bare.get_output_embeddings(), bare.get_input_embeddings()) if isinstance(module, BaseTunerLayer)]
    if outer:
        raise InputError(f"{what} adapts the head or the embeddings, which cannot be adapted: leave them out")
    if fused := [name for name, module in model.named_modules() if isinstance(module, ParamWrapper)]:
        raise InputError(
            f"{what} adapts {fused[0]}, a fused parameter (experts or their router), which no engine serves: leave it out"
        )
    halves = {name: p.dtype for name, p in model.named_parameters() if _of_adapter(name) and p.dtype != torch.float32}
    if halves:
        raise PolicyError(f"adapter weights must be fp32, but these are not: {dict(list(halves.items())[:3])}")
    return model


def _of_adapter(name: str) -> bool:
    return any(part in name for part in _ADAPTER_PARTS)


def set_training_mode(model: Any, *, gradient_checkpointing: bool) -> None:
    """Dropout lives in LoRA layers only, and only if configured; everything else stays in eval mode, so policy = reference at step 0.

    Layers under gradient checkpointing are in training mode, where many models drop by functions: `load_base` sets those shares to zero.
    """
    model.eval()
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] == "lora_dropout":
            module.train()
    if gradient_checkpointing:
        # Not reentrant: gradients reach the adapters though no input of the first layer needs one, over a 4-bit base too.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True  # of this module alone: transformers checkpoints a layer only in training mode


def trainable_parameters(model: Any, *, adapter_only: bool) -> dict[str, torch.nn.Parameter]:
    """What the optimizer gets, by name. Raises PolicyError if anything else, or nothing, is trainable: PEFT flips `requires_grad` when adapters
    are switched or switched off."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    wanted = {name for name, _ in model.named_parameters() if not adapter_only or _of_adapter(name)}
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
