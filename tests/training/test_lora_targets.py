"""Which layers an adapter adapts, and which targets and ranks are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MixtralConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
)

from dpo_loop.config import LoraShape
from dpo_loop.errors import InputError
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, trainable_parameters
from dpo_loop.types import PolicyRef
from tests.training.families import TINY, made

ACCELERATOR = build_accelerator("float32")


def fresh(base: PolicyRef, *, target: str) -> torch.nn.Module:
    loaded = load_base(base.base, accelerator=ACCELERATOR, frozen=True)
    return add_adapter(loaded, LoraShape(rank=2, target=target), seed=0)


def adapted_layers(model: torch.nn.Module) -> set[str]:
    """Last parts of their names."""
    names = trainable_parameters(model, adapter_only=True)
    return {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (GPTNeoXConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2),
         {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=2), {"c_attn", "c_proj", "c_fc"}),
        (LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True),
         {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        (MixtralConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2),
         {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (Qwen2MoeConfig(vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts=2),
         {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (BloomConfig(vocab_size=40, hidden_size=32, n_layer=1, n_head=2), {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}),
        (MambaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1), {"in_proj", "x_proj"}),
    ],
    ids=["neox", "gpt2", "tied-llama", "mixtral", "qwen2-moe", "bloom", "mamba"],
)  # fmt: skip
def test_all_linear_is_every_linear_layer_but_head_and_embeddings(tmp_path: Path, config: object, wanted: set[str]) -> None:
    made(config).save_pretrained(tmp_path)
    model = add_adapter(load_base(str(tmp_path), accelerator=ACCELERATOR, frozen=True), LoraShape(rank=2), seed=0)
    assert adapted_layers(model) == wanted


@pytest.mark.parametrize(
    "config",
    [
        Llama4TextConfig(
            **TINY, head_dim=16, num_key_value_heads=2, num_local_experts=2, intermediate_size_mlp=64, interleave_moe_layer_step=1
        ),
        PhimoeConfig(**TINY, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=2),
    ],
    ids=["llama4", "phimoe"],
)
def test_routers_that_are_linear_layers_by_name_only_are_left_out(config: PreTrainedConfig) -> None:
    """They return tuples, which PEFT's layer adds its own output to."""
    adapted = add_adapter(made(config), LoraShape(rank=2), seed=0)
    assert "router" not in adapted_layers(adapted)
    with torch.no_grad():
        adapted(torch.tensor([[5, 6, 7]]))
    with pytest.raises(InputError, match=r"'router' adapts model\.layers\.0\.\w+\.router, a \w+Router, which returns more than"):
        add_adapter(made(config), LoraShape(rank=2, target="router"), seed=0)


def test_linear_layers_of_another_class_are_linear_layers() -> None:
    """Falcon has its own, as bitsandbytes has."""
    adapted = add_adapter(
        made(FalconConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)), LoraShape(rank=2), seed=0
    )
    assert adapted_layers(adapted) == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}


def test_a_rank_that_a_layer_cannot_have_is_an_error_with_its_sizes() -> None:
    config = LlamaConfig(**TINY, num_key_value_heads=1)
    with pytest.raises(
        InputError,
        match=r"lora\.rank 17 is more than model\.layers\.0\.self_attn\.k_proj can have, .* 16 outputs of 32 inputs: lower it to 16",
    ):
        add_adapter(made(config), LoraShape(rank=17), seed=0)
    add_adapter(made(config), LoraShape(rank=16), seed=0)
    add_adapter(made(config), LoraShape(rank=17, target="q_proj"), seed=0)


@pytest.mark.parametrize("target", ["all-linear", "q_proj, k_proj"])
def test_of_a_multimodal_model_only_the_language_model_is_adapted(target: str) -> None:
    """Its vision tower has layers of the same names."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config=TINY | {"num_key_value_heads": 2, "head_dim": 16}, vision_config=vision, mm_tokens_per_image=4
    )
    model = made(config)
    assert any("vision_tower" in name and name.endswith("q_proj") for name, _ in model.named_modules())
    names = trainable_parameters(add_adapter(model, LoraShape(rank=2, target=target), seed=0), adapter_only=True)
    assert len(names) == 2 * (7 if target == "all-linear" else 2)
    assert all(".language_model.layers." in name for name in names)
    with pytest.raises(InputError, match="names fc1, which"):
        add_adapter(made(config), LoraShape(rank=2, target="fc1"), seed=0)


def test_empty_parts_of_a_target_are_nothing(base: PolicyRef) -> None:
    assert adapted_layers(fresh(base, target="q_proj, ,")) == {"q_proj"}
    for target in ("", " , "):
        with pytest.raises(InputError, match=r"names nothing; .* name some, or all-linear"):
            fresh(base, target=target)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("q_proj, lm_head", "names lm_head; the head and the embeddings cannot be adapted"),
        ("q_proj,c_attn", "names c_attn, which .* does not have; its linear layers are down_proj, gate_proj"),
        ("model.layers.7.mlp.up_proj", "names model.layers.7.mlp.up_proj, which"),
        ("mlp", "does not fit"),
    ],
)
def test_a_target_that_does_not_exist_or_cannot_be_adapted_is_named(base: PolicyRef, target: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fresh(base, target=target)


@pytest.mark.parametrize(
    ("target", "said"),
    [("q_proj, gate", "adapts .*mlp.gate, a fused parameter"), ("experts", "does not fit"), ("w1", "its linear layers are k_proj")],
)
def test_experts_and_their_router_are_refused_by_name(target: str, said: str) -> None:
    config = MixtralConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_local_experts=2
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about its own conversion of such a config
        with pytest.raises(InputError, match=said):
            add_adapter(made(config), LoraShape(rank=2, target=target), seed=0)
