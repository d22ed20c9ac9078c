from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_loop.config import KtoLoss, LoraShape, SigmoidLoss, TrainingConfig
from dpo_loop.errors import PolicyError
from dpo_loop.training.memory.plan import MOST_TOKENS, MemoryPlan, machine_bytes, plan_for, plan_memory
from dpo_loop.training.memory.shape import read_shape
from dpo_loop.training.models import add_adapter
from tests.training.memory_probe import TOKENS_OF_A_PAIR
from tests.training.shapes import LLAMA_8B, write_shape

GIB = 2**30
SMALL: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL | {"intermediate_size": 160, "num_key_value_heads": 2},
    "qwen3": SMALL | {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 32},
    "gemma2": SMALL | {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 32},
    "mistral": SMALL | {"intermediate_size": 160, "num_key_value_heads": 2, "head_dim": 16},
    "mixtral": SMALL | {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": SMALL | {"intermediate_size": 256},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 300},
}


def config(**changes: Any) -> TrainingConfig:
    return TrainingConfig.model_validate({"loss": SigmoidLoss(kind="sigmoid")} | changes)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_shape(tmp_path / "llama", LLAMA_8B)


def on_card(base: Path, gib: float, **changes: Any) -> MemoryPlan:
    return plan_memory(base, config(**changes), device="cuda", limit_bytes=int(gib * GIB))


# ------------------------------------------------------------------------------------------------------------- a real size


def test_a_llama_of_8b_with_lora_fits_24_gib_with_checkpointing(llama: Path) -> None:
    assert read_shape(llama).num_parameters == 8_030_261_248
    plan = on_card(llama, 24)
    assert (plan.fits, plan.gradient_checkpointing) == (True, True)
    assert 4_096 <= plan.micro_batch_tokens < MOST_TOKENS["cuda"]
    assert plan.weights_bytes == 2 * 8_030_261_248
    # Per layer and rank: queries and output 2 (4096 + 4096), keys and values 2 (4096 + 1024), MLP 3 (4096 + 14336); 41.9M at rank 16.
    assert plan.adapter_bytes == 16 * 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)


def test_more_memory_first_buys_tokens_then_spares_the_recomputation(llama: Path) -> None:
    plans = [on_card(llama, gib) for gib in (24, 32, 80, 400)]
    assert [plan.gradient_checkpointing for plan in plans] == [True, True, False, False]
    assert plans[0].micro_batch_tokens < plans[1].micro_batch_tokens
    assert plans[3].micro_batch_tokens == MOST_TOKENS["cuda"]
    assert all(plan.fits and plan.total_bytes <= 0.9 * (plan.limit_bytes or 0) for plan in plans)


def test_four_bits_fit_where_sixteen_do_not(llama: Path) -> None:
    assert not on_card(llama, 12).fits
    small = on_card(llama, 12, quantize_base="nf4")
    assert small.fits
    assert 5 * GIB < small.weights_bytes < 6 * GIB, "embeddings and head stay in bf16"


def test_what_the_config_says_is_not_chosen(llama: Path) -> None:
    plan = on_card(llama, 24, micro_batch_tokens=6_000, gradient_checkpointing=False)
    assert (plan.micro_batch_tokens, plan.gradient_checkpointing, plan.fits) == (6_000, False, False)


def test_a_plan_never_cuts_below_the_longest_pair(llama: Path) -> None:
    assert on_card(llama, 4).micro_batch_tokens == 2 * 2_048
    assert on_card(llama, 4, loss=KtoLoss(kind="kto")).micro_batch_tokens == 2_048
    known = plan_memory(llama, config(), device="cuda", limit_bytes=20 * GIB, longest_tokens=700)
    assert 700 <= known.micro_batch_tokens < 4_096
    assert known.fits
    # A budget below the longest pair still has to hold that pair.
    fixed, larger = (on_card(llama, 24, micro_batch_tokens=tokens) for tokens in (100, 4_096))
    assert (fixed.micro_batch_tokens, fixed.total_bytes) == (100, larger.total_bytes)


def test_without_a_limit_everything_fits(llama: Path) -> None:
    plan = plan_memory(llama, config(), device="cpu", limit_bytes=None)
    assert (plan.fits, plan.limit_bytes, plan.gradient_checkpointing) == (True, None, False)
    assert plan.micro_batch_tokens == MOST_TOKENS["cpu"]


def test_a_cpu_holds_weights_and_activations_in_fp32(llama: Path) -> None:
    cpu, card = (plan_memory(llama, config(), device=device, limit_bytes=None, longest_tokens=1) for device in ("cpu", "cuda"))
    assert cpu.weights_bytes == 2 * card.weights_bytes
    assert plan_memory(llama, config(dtype="float32"), device="cuda", limit_bytes=None).weights_bytes == cpu.weights_bytes


@pytest.mark.parametrize("lora", [LoraShape(rank=64), LoraShape(dropout=0.05), LoraShape(variant="dora")])
def test_a_larger_adapter_dropout_and_dora_cost_memory(llama: Path, lora: LoraShape) -> None:
    fixed = {"micro_batch_tokens": 4_096, "gradient_checkpointing": False}
    assert on_card(llama, 400, lora=lora, **fixed).total_bytes > on_card(llama, 400, **fixed).total_bytes


def test_the_heads_chunk_is_no_larger_than_the_tokens_there_are(llama: Path) -> None:
    few = plan_memory(llama, config(micro_batch_tokens=8), device="cuda", limit_bytes=None, longest_tokens=8)
    # In and out and the gradient's direction, bf16; three chunks of logits, fp32.
    assert few.head_bytes == 3 * 8 * 4_096 * 2 + 3 * 8 * 128_256 * 4


def test_an_adapter_of_a_few_modules_is_smaller(llama: Path) -> None:
    few = on_card(llama, 24, lora=LoraShape(target="q_proj, v_proj"))
    assert few.adapter_bytes == 16 * 32 * 16 * (8192 + 5120)


# ------------------------------------------------------------------------------------------------------------ many families


@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_are_read_from_headers_as_transformers_and_peft_have_them(family: str, tmp_path: Path) -> None:
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    made.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert shape.num_parameters == pytest.approx(made.num_parameters(), rel=0.01)
    assert (shape.hidden, shape.num_layers, shape.vocabulary) == (64, 2, 300)
    assert shape.gated is (family not in ("gpt2", "gpt_neox"))
    adapted = add_adapter(made, LoraShape(rank=4), seed=0)
    num_lora = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    plan = plan_memory(tmp_path, config(lora=LoraShape(rank=4)), device="cpu", limit_bytes=None)
    assert plan.adapter_bytes == 16 * num_lora


def test_capped_attention_is_planned_with_its_maps(tmp_path: Path) -> None:
    sizes = LLAMA_8B | {"attn_logit_softcapping": 50.0}
    capped, plain = (on_card(write_shape(tmp_path / name, sizes), 400) for name, sizes in (("capped", sizes), ("plain", LLAMA_8B)))
    assert capped.activations_bytes / capped.micro_batch_tokens > 2 * plain.activations_bytes / plain.micro_batch_tokens


def test_the_sizes_of_a_multimodal_model_are_those_of_its_text_part(tmp_path: Path) -> None:
    nested = read_shape(write_shape(tmp_path / "nested", {"text_config": LLAMA_8B, "vision_config": {"hidden_size": 8}}))
    assert nested.hidden == 4_096


def test_experts_count_as_weights_whole_and_as_activations_by_how_many_a_token_goes_through(tmp_path: Path) -> None:
    mixtral = LLAMA_8B | {"vocab_size": 32_000, "num_local_experts": 8, "num_experts_per_tok": 2}
    shape = read_shape(write_shape(tmp_path / "mixtral", mixtral))
    assert shape.num_parameters == pytest.approx(46.7e9, rel=0.001)
    assert {name.split(".")[-1] for name in shape.linears()} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    one = read_shape(write_shape(tmp_path / "one", mixtral | {"num_experts_per_tok": 1}))
    needs = [
        plan_for(each, config(micro_batch_tokens=4_096, gradient_checkpointing=False), device="cuda", limit_bytes=None)
        for each in (one, shape)
    ]
    assert 1.5 < needs[1].activations_bytes / needs[0].activations_bytes < 2


def test_shards_are_read_together(tmp_path: Path, llama: Path) -> None:
    save_file({"model.embed_tokens.weight": torch.zeros(10, 4)}, tmp_path / "llama" / "a.safetensors")
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 4)}, tmp_path / "llama" / "b.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "a.safetensors", "model.layers.0.mlp.up_proj.weight": "b.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_shape(llama).num_parameters == 72


def test_what_is_guessed_is_said(tmp_path: Path, llama: Path) -> None:
    assert "holds no safetensors: the number of parameters is guessed" in " ".join(on_card(llama, 24).notes)
    bare = write_shape(tmp_path / "bare", {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 100})
    notes = " ".join(read_shape(bare).notes)
    assert "names no attention heads; 4 are taken" in notes
    assert "names no size of the MLP; 1024" in notes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type": "strange"}', "does not say how large the model is: no hidden_size or n_embd"),
        ("[1]", "holds a list, not an object"),
        ("{", "is damaged"),
        (None, "cannot be read"),
    ],
)
def test_a_config_without_sizes_is_an_error_that_names_it(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(PolicyError, match=said):
        plan_memory(tmp_path, config(), device="cpu", limit_bytes=None)


def test_a_damaged_file_of_weights_is_named(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(PolicyError, match=r"model\.safetensors cannot be read"):
        on_card(llama, 24)


def test_planning_does_not_import_torch() -> None:
    code = "import sys; import dpo_loop.training.memory.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_memory_of_this_machine_is_known() -> None:
    assert GIB // 4 < machine_bytes() < 2**50


# ---------------------------------------------------------------------------------------------------------------- measured


@pytest.fixture(scope="module")
def measurable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 9M parameters, four layers."""
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 6, "vocab_size": 2048}
    path = tmp_path_factory.mktemp("measurable")
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, tie_word_embeddings=False)).save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_real_pass_takes_what_was_planned(measurable: Path, checkpointing: bool) -> None:
    num_pairs = 6
    tokens = num_pairs * TOKENS_OF_A_PAIR
    command = [sys.executable, "-m", "tests.training.memory_probe", str(measurable), str(num_pairs), str(checkpointing)]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert told["packed"]
    fixed = config(micro_batch_tokens=tokens, gradient_checkpointing=checkpointing)
    plan = plan_memory(measurable, fixed, device="cpu", limit_bytes=None, longest_tokens=tokens)
    planned = plan.activations_bytes + plan.head_bytes
    if not checkpointing:  # of a checkpointed layer the hooks see its recomputation too
        # What autograd kept; beside it are passing gradients and holes, and the last of four MLPs sees only what is scored.
        assert 0.5 < told["kept_bytes"] / planned < 1.05
    assert 0.4 < told["growth_bytes"] / planned < 1.6
