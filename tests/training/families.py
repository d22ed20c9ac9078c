"""Tiny random models of many decoder families, with heavy weights so that a wrong neighbour shows."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 320
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 1,
    "eos_token_id": 0,
    "bos_token_id": 0,
}
TINY = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "pad_token_id": 1,
}
"""For models of which only the layers matter."""
_GROUPED = {"num_key_value_heads": 2}
_HEADS_OF_16 = _GROUPED | {"head_dim": 16}

PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SHAPE | _GROUPED),
    "qwen3": ("Qwen3", SHAPE | _HEADS_OF_16),
    "gemma2": (
        "Gemma2",
        SHAPE | _HEADS_OF_16 | {"sliding_window": 8, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0},
    ),
    "gpt_neox": ("GPTNeoX", SHAPE),
    "mixtral": ("Mixtral", SHAPE | _GROUPED | {"num_local_experts": 4}),
    "mistral with a sliding window": ("Mistral", SHAPE | _GROUPED | {"sliding_window": 8}),
    "gpt_oss, attention sinks": ("GptOss", SHAPE | _HEADS_OF_16 | {"num_local_experts": 4, "sliding_window": 8}),
    "granite, logits divided": ("Granite", SHAPE | _GROUPED | {"logits_scaling": 4.0, "attention_multiplier": 0.2}),
    "cohere, logits multiplied": ("Cohere", SHAPE | _GROUPED | {"logit_scale": 0.25}),
    "olmo, clamped projections": ("Olmo", SHAPE | _GROUPED | {"clip_qkv": 0.5}),
    "opt, learned positions": (
        "OPT",
        {"vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64},
    ),
}  # fmt: skip
"""What is packed, and what is special about it."""

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom, attention of its own": ("Bloom", {"vocab_size": VOCAB, "hidden_size": 64, "n_layer": 2, "n_head": 4}),
    "qwen3_next, linear attention": (
        "Qwen3Next",
        SHAPE | _HEADS_OF_16
        | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "linear_num_value_heads": 4}
        | {"linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16},
    ),
}  # fmt: skip


def build(name: str) -> Any:
    kind, shape = (PACKED | PADDED)[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**shape)
    if name == "gemma2":
        config._attn_implementation = "eager"  # what load_base takes where there is an attention soft-cap
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval().requires_grad_(False)
    return heavy(model)


def made(config: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def heavy(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def with_adapter(model: Any, *, seed: int = 1) -> Any:
    """A LoRA over all linear layers that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    shape = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, shape).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(adapted).values():
            parameter.normal_(std=0.1)
    return adapted


def adapter_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def replaced(model: Any) -> list[str]:
    """Names of the modules whose forward is another than their class's."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]
