"""What is computed faster than by a model's own modules: the same values and gradients, only where it is known to be the same, and gone on demand."""

from typing import Any

import pytest
import torch

from dpo_loop.training.forward import last_layer, rms_norm, shortcuts, tree_attention
from dpo_loop.training.forward.packing import Span, pack
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.models import set_training_mode
from tests.training.families import build, replaced, with_adapter
from tests.training.test_packed_forward import CPU, assert_equal, gradients, ragged


class HalfRMSNorm(torch.nn.Module):
    """Named and shaped like one, but it is another function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(64), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x * torch.rsqrt(x[..., :32].pow(2).mean(-1, keepdim=True) + self.eps)


class OutsideRMSNorm(HalfRMSNorm):
    """eps beside the root: the same where values are large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + self.eps)


@pytest.mark.parametrize(("family", "norms"), [("llama", 5), ("qwen3", 9), ("gemma2", 9), ("gpt_neox", 0), ("mixtral", 5)])
def test_norms_that_are_known_are_replaced_and_compute_the_same(family: str, norms: int) -> None:
    model = build(family)
    rms_norm.speed_up(model)
    assert len(replaced(model)) == norms
    for module in (module for module in model.modules() if "forward" in vars(module)):
        module.weight.copy_(torch.linspace(0.2, 2.0, len(module.weight)))
        x = torch.randn(2, 5, len(module.weight), generator=torch.Generator().manual_seed(1), requires_grad=True)
        grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        ours, own = module(x), type(module).forward(module, x)
        assert torch.allclose(ours, own, rtol=1e-5, atol=1e-6)
        pulled = [torch.autograd.grad(out, x, grad)[0] for out in (ours, own)]
        assert torch.allclose(*pulled, rtol=1e-5, atol=1e-6)
    rms_norm.restore(model)
    assert replaced(model) == []


def test_norms_of_another_kind_are_left_alone() -> None:
    trained = build("llama").model.norm
    trained.weight.requires_grad_(True)
    half = build("llama").model.norm.bfloat16()
    for module in (HalfRMSNorm(), OutsideRMSNorm(), trained, half):
        rms_norm.speed_up(module)
        assert replaced(module) == []


def test_bf16_between_fp32_norms_is_left_to_the_module() -> None:
    norm = build("llama").model.norm
    rms_norm.speed_up(norm)
    x = torch.randn(3, 64).bfloat16()
    assert torch.equal(norm(x), type(norm).forward(norm, x))


def test_the_last_layer_sees_only_what_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert scorer.packed
    attended: list[int] = []
    flash = tree_attention._flash
    monkeypatch.setattr(
        tree_attention, "_flash", lambda query, *rest, **named: (attended.append(query.shape[2]), flash(query, *rest, **named))[1]
    )
    mlp = model.get_base_model().model.layers[-1].mlp
    seen: list[int] = []
    mlp.act_fn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    ours = scorer(ragged()).logps_N
    grads = gradients(ours, model)
    last_layer.restore(model.get_base_model())
    whole = scorer(ragged()).logps_N
    assert_equal((ours, grads), (whole, gradients(whole, model)))
    assert seen[0] < seen[-1]
    layout = pack(ragged()).layout
    layers = [tree_attention._calls(layout)] * (len(model.get_base_model().model.layers) - 1)
    once = [len(call.queries) for calls in layers for call in calls]
    last = {False: tree_attention._calls(layout), True: tree_attention._scored_calls(layout)}
    assert attended == [length for scored in (True, False) for length in (*once, *(len(call.queries) for call in last[scored]))]


def test_what_predicts_a_completion_attends_and_nothing_else() -> None:
    layout = pack(ragged()).layout
    asked = {place for call in tree_attention._scored_calls(layout) for place in range(call.queries.start, call.queries.end)}
    assert asked == set(pack(ragged()).scored_S.tolist()) < set(range(layout.num_tokens))


def test_a_forward_that_is_not_the_scorers_sees_everything() -> None:
    model = with_adapter(build("llama"))
    ids = torch.arange(2, 30)[None]
    expected = model(ids).logits
    scorer = build_scorer(model, device=CPU, forward="padded")
    scorer(ragged())
    assert torch.allclose(model(ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("forward", ["auto", "padded"])
def test_under_gradient_checkpointing_the_last_mlp_is_whole_and_gradients_are_the_same(forward: Any) -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward=forward)
    ours = scorer(ragged()).logps_N
    grads = gradients(ours, model)
    set_training_mode(model, gradient_checkpointing=True)
    again = scorer(ragged()).logps_N
    assert_equal((again, gradients(again, model)), (ours, grads))


def test_a_shortcut_that_is_wrong_for_a_model_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a norm had passed its trial and computed something else all the same."""
    right = rms_norm._normed
    monkeypatch.setattr(rms_norm, "_normed", lambda module, offset, x: right(module, offset, x) * (1 + 0.1 * (x.shape[1] > 2)))
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert scorer.packed
    assert not scorer.shortcuts
    assert "the model's own modules" in scorer.reason
    assert replaced(model) == []
    with scorer.native():
        pass
    assert replaced(model) == []


def test_the_model_is_as_it_came_inside_native_and_once_left() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    taken = replaced(model)
    assert taken
    with scorer.native():
        assert replaced(model) == []
    assert replaced(model) == taken
    ours = scorer(ragged()).logps_N
    with pytest.raises(ZeroDivisionError), scorer.native():
        1 / 0  # noqa: B018
    assert torch.equal(scorer(ragged()).logps_N, ours)
    shortcuts.leave(model.get_base_model())
    assert replaced(model) == []


def test_long_causal_spans_are_cut_without_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    whole = scorer(ragged()).logps_N
    grads = gradients(whole, model)
    monkeypatch.setattr(tree_attention, "_CUT_FROM", 4)
    monkeypatch.setattr(tree_attention, "_BLOCK", 3)
    assert len(tree_attention._causal(Span(0, 16))) == 2 * 5 + 1, "five blocks, and one token before them"
    cut = scorer(ragged()).logps_N
    assert_equal((cut, gradients(cut, model)), (whole, grads))


def test_shortcuts_can_be_taken_twice() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    once = scorer(ragged()).logps_N
    shortcuts.take(model.get_base_model())
    assert torch.equal(scorer(ragged()).logps_N, once)
