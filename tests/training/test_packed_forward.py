"""Packed rows against a forward per sequence through transformers and PEFT alone: log-probs and LoRA gradients, family by family."""

import random
from typing import Any

import pytest
import torch

from dpo_loop.training.forward import lora_linear
from dpo_loop.training.forward.logprobs import completion_logprobs, set_attention
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.forward.tree_attention import tree_attention
from dpo_loop.training.models import set_training_mode
from tests.training.families import PACKED, PADDED, VOCAB, adapter_parameters, build, with_adapter

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Relative, in fp32."""


def ragged() -> list[TokenSequence]:
    """Several completions of a prompt, one of them asked twice, one-token prompts and completions, sequences beyond a window of 8."""
    draw = random.Random(3)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, VOCAB) for _ in range(count))

    long, one, middle, again = ids(20), ids(1), ids(7), ids(9)
    rows = [(long, again), (long, ids(15)), (one, ids(1)), (long, ids(4)), (long, again), (one, ids(6)), (middle, ids(30))]
    return [TokenSequence(*row) for row in [*rows, (middle, ids(2))]]


def gradients(logps_N: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    """Of a sum with a weight of its own for every token."""
    weights_N = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(5))
    parameters = adapter_parameters(model)
    grads = torch.autograd.grad((logps_N * weights_N).sum(), list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


def separate(model: Any) -> torch.Tensor:
    """The model as it came, one sequence at a time, its own head."""
    return torch.cat([completion_logprobs(model, [sequence], device=CPU) for sequence in ragged()])


def assert_equal(ours: tuple[Any, Any], theirs: tuple[Any, Any]) -> None:
    logps, grads = ours
    expected, expected_grads = theirs
    assert torch.allclose(logps, expected, rtol=TOLERANCE, atol=0)
    off = sum(float((grads[name] - expected_grads[name]).double().square().sum()) for name in grads)
    size = sum(float(grad.double().square().sum()) for grad in expected_grads.values())
    assert (off / size) ** 0.5 < TOLERANCE


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")  # PEFT, on fused experts
@pytest.mark.parametrize("family", [*PACKED, *PADDED])
def test_log_probs_and_gradients_are_those_of_separate_forwards(family: str) -> None:
    model = with_adapter(build(family))
    scorer = build_scorer(model, device=CPU, forward="auto", longest=40)
    assert scorer.packed == (family in PACKED), scorer.reason
    assert scorer.head is not None
    ours = scorer(ragged(), with_collisions=True)
    grads = gradients(ours.logps_N, model)
    with scorer.native():
        if model.get_base_model()._can_set_attn_implementation():
            set_attention(model, "eager")
        expected = separate(model)
        assert_equal((ours.logps_N, grads), (expected, gradients(expected, model)))
        collisions = []
        for prompt, completion in ragged():
            probs = model(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1].float().softmax(-1)
            collisions.append(probs.square().sum(-1).log())
    assert torch.allclose(ours.log_collisions_N, torch.cat(collisions), atol=1e-4)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    plain = scorer(ragged()).logps_N
    grads = gradients(plain, model)
    set_training_mode(model, gradient_checkpointing=True)
    forwards = []
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))
    again = scorer(ragged()).logps_N
    assert_equal((again, gradients(again, model)), (plain, grads))
    assert len(forwards) == 4  # both layers, once more on the way back


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = with_adapter(build("llama"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    set_training_mode(model, gradient_checkpointing=False)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    assert any(modes)
    build_scorer(model, device=CPU, forward="auto")
    assert [module.training for module in model.modules()] == modes
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]


def test_a_model_that_was_packed_can_be_probed_again() -> None:
    model = with_adapter(build("llama"))
    first = build_scorer(model, device=CPU, forward="auto")
    again = build_scorer(model, device=CPU, forward="padded")
    assert again.native_attention == first.native_attention == "sdpa"
    assert torch.allclose(again(ragged()).logps_N, separate(model), atol=1e-5)


def test_padded_rows_are_taken_when_they_are_asked_for() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="padded")
    assert not scorer.packed
    assert scorer.reason.startswith("padded: ")
    assert "asked for" in scorer.reason


def test_a_wrong_head_is_not_used() -> None:
    """A config that multiplies logits, and a model that does not."""
    model = with_adapter(build("llama"))
    model.get_base_model().config.logit_scale = 3.0
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert scorer.packed
    assert scorer.head is None
    with scorer.native():
        expected = separate(model)
    assert torch.allclose(scorer(ragged()).logps_N, expected, atol=1e-4)


def test_a_window_is_probed_past_its_edge_only_if_sequences_go_there() -> None:
    seen: list[int] = []
    for longest in (8, 40):
        model = with_adapter(build("mistral with a sliding window"))
        handle = model.get_base_model().model.register_forward_pre_hook(
            lambda _module, _args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        model.get_base_model().config.sliding_window = 200
        build_scorer(model, device=CPU, forward="auto", longest=5 * longest + 10)
        handle.remove()
    assert max(seen) > 200


def test_plain_lora_layers_are_replaced_and_put_back() -> None:
    model = with_adapter(build("llama"))
    layers = [module for module in model.modules() if type(module) is lora_linear.Linear]
    assert len(layers) == 14
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert all("forward" in vars(layer) for layer in layers)
    with scorer.native():
        assert not any("forward" in vars(layer) for layer in layers)
    assert all("forward" in vars(layer) for layer in layers)
    with torch.no_grad(), model.disable_adapter():
        bare = scorer(ragged()).logps_N
    assert not torch.allclose(bare, scorer(ragged()).logps_N, atol=1e-2)


def test_lora_dropout_goes_through_peft() -> None:
    model = with_adapter(build("llama"))
    for name, module in model.named_modules():
        if name.endswith("lora_dropout"):
            module["default"] = torch.nn.Dropout(0.5)
    scorer = build_scorer(model, device=CPU, forward="auto")
    set_training_mode(model, gradient_checkpointing=False)
    assert not torch.equal(scorer(ragged()).logps_N, scorer(ragged()).logps_N)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_layers_under_autocast_compute_what_peft_computes(kind: torch.dtype) -> None:
    """A base in bf16 with adapters in fp32, as on a GPU; fp32 for comparison."""
    model = with_adapter(build("llama").to(kind))
    layer = next(module for module in model.modules() if type(module) is lora_linear.Linear)
    for parameter in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
        parameter.data = parameter.data.float()
    x = torch.randn(1, 6, 64, dtype=kind, requires_grad=True)
    grads = []
    for fast in (False, True):
        if fast:
            lora_linear.speed_up(model)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind is torch.bfloat16):
            out = layer(x)
        wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
        grads.append([out.detach().float(), *torch.autograd.grad(out.float().square().sum(), wanted)])
    for theirs, ours in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert float((ours - theirs).norm() / theirs.norm()) < (2e-2 if kind is torch.bfloat16 else 1e-5)


def test_attention_without_a_layout_of_its_row_is_an_error() -> None:
    tensor = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="tree_layout"):
        tree_attention(torch.nn.Module(), tensor, tensor, tensor, None)
