"""What may be trained, where dropout may live, and which bases and adapters are refused before anything is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, OPTConfig, PhimoeConfig, PreTrainedConfig, Starcoder2Config, XGLMConfig

from dpo_loop.config import LoraShape
from dpo_loop.errors import InputError, PolicyError
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.model_checks import check_token_ids, vocabulary_size
from dpo_loop.training.models import (
    add_adapter,
    build_accelerator,
    continue_adapter,
    load_base,
    load_policy,
    save_adapter,
    set_training_mode,
    trainable_parameters,
)
from dpo_loop.training.seed import _save_model
from dpo_loop.types import PolicyRef
from tests.builders import build_adapter, build_model
from tests.training.families import TINY, heavy, made

ACCELERATOR = build_accelerator("float32")
IDS = torch.tensor([[5, 6, 7, 8, 9]])


def fresh(base: PolicyRef, *, seed: int = 0, **shape: object) -> torch.nn.Module:
    loaded = load_base(base.base, accelerator=ACCELERATOR, frozen=True)
    return add_adapter(loaded, LoraShape.model_validate({"rank": 2} | shape), seed=seed)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


# ------------------------------------------------------------------------------------------------- what is trained


def test_a_parameter_that_peft_left_trainable_is_found(base: PolicyRef) -> None:
    """T15: leaving `disable_adapter()` or switching adapters turns gradients on where nobody asked for them."""
    model = fresh(base)
    assert all(".lora_" in name for name in trainable_parameters(model, adapter_only=True))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(PolicyError, match=r"unexpected \['base_model.model.lm_head.weight'\]"):
        trainable_parameters(model, adapter_only=True)
    model.requires_grad_(False)
    with pytest.raises(PolicyError, match="missing"):
        trainable_parameters(model, adapter_only=True)


def test_dropout_is_live_in_lora_layers_only(base: PolicyRef) -> None:
    """T26: any other dropout would make the policy differ from its own reference."""
    bare = load_base(base.base, accelerator=ACCELERATOR, frozen=True)
    bare.model.layers[0].mlp.extra = torch.nn.Dropout(0.5)
    model = add_adapter(bare, LoraShape(rank=2, dropout=0.1), seed=0)
    set_training_mode(model, gradient_checkpointing=False)
    live = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training]
    assert live
    assert all("lora_dropout" in name for name in live)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2),
        Starcoder2Config(**TINY, num_key_value_heads=2, residual_dropout=0.3, embedding_dropout=0.2),
        XGLMConfig(vocab_size=40, d_model=32, ffn_dim=64, num_layers=1, attention_heads=2, dropout=0.3, layerdrop=0.5),
    ],
    ids=["opt", "starcoder2", "xglm"],
)
def test_gradient_checkpointing_wakes_no_dropout(tmp_path: Path, config: PreTrainedConfig) -> None:
    """T26: a checkpointed layer is in training mode, and these drop by a function of their own. At step 0 policy = reference."""
    made(config).save_pretrained(tmp_path)
    bare = load_base(str(tmp_path), accelerator=ACCELERATOR, frozen=True)
    expected = logits(bare)
    model = add_adapter(bare, LoraShape(rank=2), seed=0)
    set_training_mode(model, gradient_checkpointing=True)
    assert torch.equal(logits(model), expected)
    scorer = build_scorer(model, device=ACCELERATOR.device, forward="auto")
    sequences = [TokenSequence((5, 6, 7), (8, 9))]
    assert torch.equal(scorer(sequences).logps_N, scorer(sequences).logps_N)


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3),
        PhimoeConfig(**TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3),
    ],
    ids=["opt", "phimoe"],
)
def test_what_is_switched_off_changes_nothing_in_eval_mode(tmp_path: Path, config: PreTrainedConfig) -> None:
    """PhiMoE's gates depend on its router's jitter in eval mode, too."""
    published = heavy(made(config))
    published.save_pretrained(tmp_path)
    assert torch.equal(logits(load_base(str(tmp_path), accelerator=ACCELERATOR, frozen=True)), logits(published))


def test_a_model_is_saved_with_the_dropout_that_it_was_published_with(tmp_path: Path) -> None:
    made(OPTConfig(**TINY, ffn_dim=64, word_embed_proj_dim=32, dropout=0.3)).save_pretrained(tmp_path / "start")
    model = load_base(str(tmp_path / "start"), accelerator=ACCELERATOR, frozen=False)
    assert model.config.dropout == 0
    _save_model(model, tmp_path / "model", like=tmp_path / "start")
    published, saved = (json.loads((tmp_path / each / "config.json").read_text()) for each in ("start", "model"))
    assert published["dropout"] == 0.3
    assert saved == published


def test_a_fresh_adapter_is_a_function_of_its_seed(base: PolicyRef) -> None:
    one, same, other = (
        torch.cat([p.flatten() for n, p in fresh(base, seed=seed).named_parameters() if ".lora_A." in n]) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_a_fresh_adapter_says_what_the_base_says(base: PolicyRef, variant: str) -> None:
    bare = load_base(base.base, accelerator=ACCELERATOR, frozen=True)
    assert torch.allclose(logits(fresh(base, variant=variant)), logits(bare), atol=0 if variant != "dora" else 1e-5, rtol=0)


def test_rslora_scales_by_the_root_of_the_rank(base: PolicyRef) -> None:
    """alpha / sqrt(rank) = 8 / 2 where LoRA has alpha / rank = 8 / 4: the same B says twice as much (arXiv 2312.03732 eq. 4)."""
    layer = {
        variant: fresh(base, rank=4, alpha=8, variant=variant).base_model.model.model.layers[0].mlp.up_proj
        for variant in ("lora", "rslora")
    }
    assert {variant: each.scaling["default"] for variant, each in layer.items()} == {"lora": 2.0, "rslora": 4.0}


def test_dora_learns_a_magnitude_for_every_output(base: PolicyRef) -> None:
    """At the start it is the norm of each row of W, arXiv 2402.09353 eq. 5."""
    model = fresh(base, variant="dora")
    found = trainable_parameters(model, adapter_only=True)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    magnitude = found["base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight"]
    assert torch.allclose(magnitude, layer.base_layer.weight.norm(dim=1))


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_adapters_are_fp32_over_a_base_of_16_bits(base: PolicyRef, variant: str) -> None:
    """T25: an update smaller than the last bit of a bf16 weight is lost."""
    half = load_base(base.base, accelerator=ACCELERATOR, frozen=True).to(torch.bfloat16)
    model = add_adapter(half, LoraShape(rank=2, variant=variant), seed=0)
    assert {p.dtype for p in trainable_parameters(model, adapter_only=True).values()} == {torch.float32}
    assert model.get_base_model().lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_an_adapter_that_is_saved_and_continued_is_the_same_to_the_bit(
    tmp_path: Path, base: PolicyRef, variant: str, gradient_checkpointing: bool
) -> None:
    model = fresh(base, variant=variant)
    set_training_mode(model, gradient_checkpointing=gradient_checkpointing)
    parameters = trainable_parameters(model, adapter_only=True)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in parameters.values())
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    save_adapter(model, tmp_path / "adapter", policy=base)
    again = continue_adapter(load_base(base.base, accelerator=ACCELERATOR, frozen=True), tmp_path / "adapter", dropout=0.0)
    assert torch.equal(logits(again), logits(model))
    assert (logits(again) - logits(load_base(base.base, accelerator=ACCELERATOR, frozen=True))).abs().max() > 1e-3
    config = again.peft_config["default"]
    assert (config.use_rslora, config.use_dora) == (variant == "rslora", variant == "dora")
    assert trainable_parameters(again, adapter_only=True).keys() == parameters.keys()


# ----------------------------------------------------------------------------------------------------------- bases


def copy_of(base: PolicyRef, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    shutil.copytree(base.base, folder)
    return folder, load_file(folder / "model.safetensors")


def store(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_base_with_weights_that_are_no_numbers_is_refused_with_the_first_tensor(
    tmp_path: Path, base: PolicyRef, value: float
) -> None:
    folder, weights = copy_of(base, tmp_path / "model")
    weights["model.layers.1.mlp.up_proj.weight"][0, :3] = value
    store(folder, weights)
    with pytest.raises(PolicyError, match=r"3 of 8192 weights in model\.layers\.1\.mlp\.up_proj\.weight are NaN or infinite"):
        load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


def test_large_weights_whose_sum_overflows_are_numbers(tmp_path: Path, base: PolicyRef) -> None:
    folder, weights = copy_of(base, tmp_path / "model")
    weights["model.norm.weight"].fill_(3e38)
    store(folder, weights)
    load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


def test_a_base_that_lacks_weights_is_not_filled_with_random_ones(tmp_path: Path, base: PolicyRef) -> None:
    folder, weights = copy_of(base, tmp_path / "model")
    del weights["model.layers.1.mlp.up_proj.weight"]
    store(folder, weights)
    with pytest.raises(PolicyError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight \(1 tensors\)"):
        load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


def rewrite(folder: Path, **config: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def test_a_config_that_says_fewer_layers_than_there_are_is_refused(tmp_path: Path, base: PolicyRef) -> None:
    """transformers loads the first layers only, with a warning."""
    folder, _ = copy_of(base, tmp_path / "model")
    rewrite(folder, num_hidden_layers=1)
    with pytest.raises(PolicyError, match=r"holds model\.layers\.1\..* \(9 tensors\), for which its config\.json has no place"):
        load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


@pytest.mark.parametrize(
    "name",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.1.mlp.up_proj.bias", "model.norm.bias", "layers.1.self_attn.sinks", "lm_head.bias"],
)  # fmt: skip
def test_weights_that_the_config_has_no_place_for_are_refused(tmp_path: Path, base: PolicyRef, name: str) -> None:
    folder, weights = copy_of(base, tmp_path / "model")
    store(folder, weights | {name: torch.zeros(4)})
    with pytest.raises(PolicyError, match=rf"holds .*{name.removeprefix('model.')} \(1 tensors\), for which"):
        load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.0.self_attn.masked_bias",
        "model.vision_tower.layers.0.mlp.up_proj.weight",
        "mtp.layers.0.mlp.up_proj.weight",
        "model.layers.2.eh_proj.weight",  # a head that predicts the token after the next, by num_nextn_predict_layers
    ],
)
def test_what_lies_beside_the_decoder_may_be_left_out(tmp_path: Path, base: PolicyRef, name: str) -> None:
    folder, weights = copy_of(base, tmp_path / "model")
    store(folder, weights | {name: torch.zeros(4)})
    rewrite(folder, num_nextn_predict_layers=1)
    load_base(str(folder), accelerator=ACCELERATOR, frozen=True)


def test_a_tied_head_is_not_a_missing_one(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True
    )
    made(config).save_pretrained(tmp_path)
    model = load_base(str(tmp_path), accelerator=ACCELERATOR, frozen=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_soft_capped_model_gets_the_attention_that_does_not_drop_the_cap(tmp_path: Path) -> None:
    """T34: transformers' sdpa ignores it without a word."""
    config = AutoConfig.for_model(
        "gemma2", vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
    )  # fmt: skip
    made(config).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), accelerator=ACCELERATOR, frozen=True).config._attn_implementation == "eager"


def test_models_loaded_from_one_directory_do_not_share_a_config(base: PolicyRef) -> None:
    """T33: switching the attention of one would switch the other's."""
    one, two = (load_base(base.base, accelerator=ACCELERATOR, frozen=True) for _ in range(2))
    one.set_attn_implementation("eager")
    assert two.config._attn_implementation == "sdpa"


def test_a_token_that_the_model_has_no_embedding_for_is_named(base: PolicyRef) -> None:
    assert vocabulary_size(base.base) == 320
    fine = TokenSequence((0, 319), (5,))
    check_token_ids([fine, fine], 320)
    with pytest.raises(InputError, match="sequence 1: token id 320 in its completion is not in the model's vocabulary of 320"):
        check_token_ids([fine, TokenSequence((1,), (2, 320, 321))], 320)
    with pytest.raises(InputError, match="sequence 0: token id -1 in its prompt"):
        check_token_ids([TokenSequence((-1,), (2,))], 320)


def test_a_base_in_4_bits_is_refused_where_it_cannot_be_computed(base: PolicyRef) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(
        InputError, match=r"training\.quantize_base: nf4 needs a CUDA device \(this trains on cpu\).*leave the key out"
    ):
        load_policy(base, accelerator=ACCELERATOR, quantize_base="nf4")


# -------------------------------------------------------------------------------------------------------- adapters


def damaged(adapted: PolicyRef, folder: Path, **config: object) -> tuple[Path, dict[str, torch.Tensor]]:
    shutil.copytree(str(adapted.adapter), folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder, load_file(folder / "adapter_model.safetensors")


def carry_on(adapted: PolicyRef, folder: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    continue_adapter(load_base(adapted.base, accelerator=ACCELERATOR, frozen=True), folder, dropout=0.0)


def test_an_adapter_with_weights_that_are_no_numbers_is_refused(tmp_path: Path, adapted: PolicyRef) -> None:
    folder, weights = damaged(adapted, tmp_path / "adapter")
    name = next(name for name in weights if "layers.1" in name and "lora_B" in name)
    weights[name][0, 0] = float("nan")
    with pytest.raises(PolicyError, match=f"1 of .* weights in {name} are NaN"):
        carry_on(adapted, folder, weights)


def test_an_adapter_of_which_a_part_is_gone_is_not_filled_up(tmp_path: Path, adapted: PolicyRef) -> None:
    """PEFT warns, and trains on with a fresh part."""
    folder, weights = damaged(adapted, tmp_path / "adapter")
    (gone,) = [name for name in weights if "layers.1.mlp.up_proj.lora_B" in name]
    del weights[gone]
    with pytest.raises(PolicyError, match=f"{gone} is only in the model"):
        carry_on(adapted, folder, weights)


def test_an_adapter_with_parts_for_other_modules_is_refused(tmp_path: Path, adapted: PolicyRef) -> None:
    """PEFT leaves them out without a word."""
    folder, weights = damaged(adapted, tmp_path / "adapter")
    weights |= {name.replace("layers.1", "layers.2"): tensor.clone() for name, tensor in weights.items() if "layers.1" in name}
    with pytest.raises(PolicyError, match=r"layers\.2\..* is only in the file"):
        carry_on(adapted, folder, weights)


def test_an_adapter_of_another_shape_or_of_other_modules_is_refused(tmp_path: Path, adapted: PolicyRef) -> None:
    wide = build_model(tmp_path / "wide", hidden=128)
    adapter = build_adapter(tmp_path / "adapter", wide, rank=4)
    with pytest.raises(
        PolicyError, match=r"does not fit .*: size mismatch for .*q_proj.lora_A.* is torch.Size\(\[4, 64\]\)\. Give"
    ):
        continue_adapter(load_base(adapted.base, accelerator=ACCELERATOR, frozen=True), adapter, dropout=0.0)
    folder, weights = damaged(adapted, tmp_path / "elsewhere", target_modules=["c_attn"])
    with pytest.raises(PolicyError, match=r"does not fit .*c_attn"):
        carry_on(adapted, folder, weights)


def test_some_layers_only_and_another_alpha_here_and_there_are_continued(tmp_path: Path, base: PolicyRef) -> None:
    shape = {"layers_to_transform": [1], "alpha_pattern": {"up_proj": 2}, "target_modules": ["up_proj", "q_proj"]}
    adapter = build_adapter(tmp_path / "adapter", Path(base.base), rank=4, **shape)
    model = continue_adapter(load_base(base.base, accelerator=ACCELERATOR, frozen=True), adapter, dropout=0.0)
    save_adapter(model, tmp_path / "again", policy=base)
    again = continue_adapter(load_base(base.base, accelerator=ACCELERATOR, frozen=True), tmp_path / "again", dropout=0.0)
    assert all("layers.1" in name for name in trainable_parameters(again, adapter_only=True))
    assert torch.equal(logits(again), logits(model))
