"""What the probe lets through and what it does not: in fp32, in weights of bf16 and under bf16 autocast, past windows, and with live noise."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import transformers

from dpo_loop.errors import PolicyError
from dpo_loop.training.forward import logprobs, packing
from dpo_loop.training.forward.packing import PackedRow, Span, Tree, TreeLayout
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.yardstick import Yardstick
from dpo_loop.training.models import set_training_mode
from tests.training.families import PACKED, SHAPE, adapter_parameters, build, heavy, with_adapter

CPU = torch.device("cpu")
AUTOCAST = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
probed = partial(build_scorer, device=CPU, forward="auto", longest=40)


def lowered(family: str, weights: torch.dtype) -> Any:
    """As on a GPU: a base in bf16, or in fp32 where all weights are trained, with adapters in fp32."""
    model = with_adapter(build(family).to(weights))
    for parameter in adapter_parameters(model).values():
        parameter.data = parameter.data.float()
    return model


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT, on fused experts
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", PACKED)
def test_right_models_are_packed_under_bf16_autocast(family: str, weights: torch.dtype) -> None:
    scorer = probed(lowered(family, weights), autocast=AUTOCAST)
    assert scorer.packed, scorer.reason
    assert scorer.head is not None


def test_a_model_of_which_all_weights_are_trained_is_packed_under_autocast() -> None:
    """Its weights are fp32, what it computes is not: judged as fp32, it fell to the slowest route."""
    scorer = probed(build("llama").requires_grad_(True), autocast=AUTOCAST)
    assert scorer.packed, scorer.reason


def seeing_siblings(pack: Callable[..., PackedRow], *args: Any) -> PackedRow:
    """All branches of a tree taken for one: each sees those before it."""
    row = pack(*args)
    trees = [Tree(tree.prompt, (Span(tree.branches[0].start, tree.branches[-1].end),)) for tree in row.layout.trees]
    return replace(row, layout=TreeLayout(tuple(trees), row.layout.num_tokens))


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
@pytest.mark.parametrize(
    ("weights", "autocast"), [(torch.bfloat16, True), (torch.float32, True), (torch.bfloat16, False), (torch.float32, False)]
)
@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral", "cohere, logits multiplied", "mistral with a sliding window"])
def test_a_branch_that_sees_its_sibling_is_found(
    monkeypatch: pytest.MonkeyPatch, family: str, weights: torch.dtype, autocast: bool
) -> None:
    monkeypatch.setattr(logprobs, "pack", partial(seeing_siblings, packing.pack))
    model = lowered(family, weights) if autocast else with_adapter(build(family)).to(weights)
    scorer = probed(model, autocast=AUTOCAST if autocast else nullcontext)
    assert not scorer.packed, scorer.reason
    assert "when packed differ by" in scorer.reason
    assert scorer.head is not None  # padded rows are right, and known to be


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_a_window_that_is_wrong_by_one_is_found(weights: torch.dtype) -> None:
    model = lowered("gemma2", weights)
    assert probed(model, autocast=AUTOCAST).packed
    model.get_base_model().model.layers[0].self_attn.sliding_window += 1  # what our attention is told; eager attention gets a mask
    assert not probed(model, autocast=AUTOCAST).packed


def test_regions_are_judged_one_by_one() -> None:
    """20 tokens before a window that are right, 4 past it that are wrong by what all 24 together may be."""
    region_N = torch.tensor([0] * 20 + [1] * 4)
    expected_N = torch.full((24,), -1.0)
    rounding_DN = torch.full((1, 24), 0.01)
    yardstick = Yardstick(expected_N, rounding_DN, region_N, allowed=0.01)
    wrong_N = expected_N - 0.08 * region_N
    worst, excess = yardstick.compare(wrong_N)
    assert worst == pytest.approx(0.08)
    assert excess == pytest.approx(0.08 / (0.01 + 3 * 0.01))
    assert yardstick.compare(expected_N - 0.03)[1] == pytest.approx(0.75)
    assert yardstick.compare(torch.full((24,), float("nan"))) == (float("inf"), float("inf"))


# ------------------------------------------------------------------------------------------- lengths that attention minds


def heavily(kind: str, config: str, **shape: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, config)(**SHAPE | shape))
    return heavy(model.float().eval().requires_grad_(False))


def llama4(**shape: Any) -> Any:
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 96, "moe_layers": [], "head_dim": 16, "num_key_value_heads": 2}
    return heavily("Llama4", "Llama4TextConfig", **experts | {"attn_temperature_tuning": False} | shape)


def test_attention_in_chunks_is_packed_up_to_a_chunk() -> None:
    """The tree attention knows nothing of chunks."""
    assert probed(llama4(attention_chunk_size=64, no_rope_layers=[1, 1]), longest=60).packed
    scorer = probed(llama4(attention_chunk_size=64, no_rope_layers=[1, 1]), longest=80)
    assert not scorer.packed
    assert "when packed differ" in scorer.reason


@pytest.mark.parametrize("family", ["llama4", "phimoe"])
def test_a_router_that_is_a_linear_layer_by_class_is_no_obstacle(family: str) -> None:
    if family == "llama4":
        model = llama4(moe_layers=[1], no_rope_layers=[1, 1])
    else:
        model = heavily("Phimoe", "PhimoeConfig", num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    assert probed(model).packed


def test_attention_that_changes_at_a_place_of_the_row_is_not_packed() -> None:
    """No sequence is so long, but a row of many is, and Llama 4 counts from its beginning."""
    scorer = probed(llama4(no_rope_layers=[0, 0], attn_temperature_tuning=True, floor_scale=8192))
    assert not scorer.packed
    assert "attention changes past token 8192 of a row" in scorer.reason


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_positions_that_depend_on_the_batch_are_refused_past_the_length_where_they_do(rope: dict[str, Any]) -> None:
    limit = 64 if rope["rope_type"] == "dynamic" else 256
    model = heavily("Llama", "LlamaConfig", max_position_embeddings=limit, rope_parameters=rope | {"rope_theta": 10000.0})
    assert probed(model, longest=64).packed
    with pytest.raises(PolicyError, match=rf"has {rope['rope_type']} positions: beyond 64 tokens .* Lower max_length to 64"):
        probed(model, longest=65)


# ----------------------------------------------------------------------------------------- models that cannot be trained


def test_dropout_that_is_live_in_the_mode_of_training_is_an_error() -> None:
    """Gradient checkpointing puts OPT's layers in training mode, and they drop by a function; `load_base` would have set its share to 0."""
    model = with_adapter(build("opt, learned positions"))
    assert model.get_base_model().model.decoder.layers[0].dropout == 0.1
    set_training_mode(model, gradient_checkpointing=False)
    assert probed(model).packed
    set_training_mode(model, gradient_checkpointing=True)
    with pytest.raises(PolicyError, match=r"two forwards of the same tokens differ by .* leave gradient_checkpointing off"):
        probed(model)


def test_the_probe_draws_no_random_number_of_ours() -> None:
    model = with_adapter(build("llama"))
    before = torch.get_rng_state()
    probed(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_model_whose_own_forward_fails_is_named() -> None:
    model = build("llama")
    model.config.name_or_path = "models/broken"
    model.model.layers[0].mlp.register_forward_hook(lambda _module, _args, output: (output, None))
    with pytest.raises(PolicyError, match=r"models/broken: the model's own forward fails \(TypeError: .*\); adapt other layers"):
        probed(model)


def test_memory_that_runs_out_is_not_the_models_fault() -> None:
    def exhaust(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    model = build("llama")
    model.model.layers[0].register_forward_hook(exhaust)
    with pytest.raises(torch.OutOfMemoryError):
        probed(model)


def test_a_model_whose_rows_see_one_another_is_refused() -> None:
    """No forward of several sequences is right, and the last resort was taken without a look."""
    model = build("llama")
    model.model.layers[0].register_forward_pre_hook(lambda _module, args: (args[0] + args[0].mean(dim=(0, 1)), *args[1:]))
    with pytest.raises(PolicyError, match="between a forward of several sequences and one of each"):
        probed(model)
