"""LoRA layers in matrix products alone, one by one or together, compute what PEFT computes."""

from typing import Any

import pytest
import torch

from dpo_loop.training.forward import lora_linear, shortcuts
from dpo_loop.training.forward.logprobs import completion_logprobs
from dpo_loop.training.forward.probe import build_scorer
from tests.training.families import build, with_adapter
from tests.training.test_packed_forward import CPU, assert_equal, gradients, ragged


def test_queries_keys_and_values_are_computed_together_and_nothing_is_kept_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama"))
    lora_linear.speed_up(model)
    attention = model.get_base_model().model.layers[0].self_attn
    together: list[int] = []
    right = lora_linear.project
    monkeypatch.setattr(lora_linear, "project", lambda x, loras: together.append(len(loras)) or right(x, loras))  # type: ignore[func-returns-value]
    ids = torch.arange(2, 30)[None]
    model(ids)
    assert together[:5] == [3, 1, 1, 1, 1], "queries with keys and values; output, gate, up, down"
    group = attention.q_proj.forward.func.__self__
    assert (group.input, group.outs) == (None, {})
    lora_linear.restore(model)
    monkeypatch.setattr(type(attention), "forward", lambda self, hidden_states, **_: (self.q_proj(hidden_states), 1 / 0))
    lora_linear.speed_up(model)
    group = attention.q_proj.forward.func.__self__
    with pytest.raises(ZeroDivisionError):
        model(ids)
    assert (group.input, group.outs) == (None, {}), "not even after a failure half-way"


def test_layers_that_go_together_compute_what_peft_computes_in_any_order() -> None:
    model = with_adapter(build("llama"))
    attention = model.get_base_model().model.layers[0].self_attn
    attention.k_proj.scaling["default"] = 3.0
    weights = [getattr(attention, name).lora_A["default"].weight for name in ("q_proj", "k_proj", "v_proj")]
    x, other = (torch.randn(1, 7, 64, requires_grad=True) for _ in range(2))

    def run() -> list[torch.Tensor]:
        outs = [attention.v_proj(x), attention.q_proj(x), attention.k_proj(other), attention.k_proj(x)]
        return [*outs, *torch.autograd.grad(sum(out.sin().sum() for out in outs), [x, other, *weights])]

    theirs = run()
    lora_linear.speed_up(model)
    for mine, own in zip(run(), theirs, strict=True):
        assert torch.allclose(mine, own, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["changed in place", "other keys", "queries only"])
def test_a_module_that_does_not_give_them_the_same_is_computed_layer_by_layer(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama"))
    attention = model.get_base_model().model.layers[0].self_attn

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        query = self.q_proj(x)
        if mode == "queries only":
            return query.sin()  # type: ignore[no-any-return]
        if mode == "changed in place":
            with torch.no_grad():
                x.add_(1)
        other = x if mode == "changed in place" else x.flip(1)
        return torch.cat([query, self.k_proj(other), self.v_proj(other)], dim=-1).sin()

    monkeypatch.setattr(type(attention), "forward", forward)
    x = torch.randn(1, 5, 64)
    weights = [layer.lora_A["default"].weight for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]

    def run() -> list[torch.Tensor | None]:
        out = attention(x)
        return [out.detach(), *torch.autograd.grad(out.sum(), weights, allow_unused=True)]

    with torch.no_grad():
        own = attention(x)
    theirs = run() if mode != "changed in place" else [own]
    lora_linear.speed_up(model)
    together: list[int] = []
    right = lora_linear.project
    monkeypatch.setattr(lora_linear, "project", lambda x, loras: together.append(len(loras)) or right(x, loras))  # type: ignore[func-returns-value]
    with torch.no_grad():
        assert torch.allclose(attention(x), own, atol=1e-5)
    if mode != "changed in place":
        for mine, other in zip(run(), theirs, strict=True):
            assert (mine is None) == (other is None), "what nothing was made of gets no gradient, and no weight decay"
            assert mine is None or other is None or torch.allclose(mine, other, rtol=1e-4, atol=1e-5)
    assert together[0] == 3
    assert together[-1] == 1


def test_what_a_projection_gives_may_be_changed_in_place() -> None:
    """As OLMo clamps its queries, keys and values."""
    model = with_adapter(build("olmo, clamped projections"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert scorer.packed
    assert scorer.shortcuts
    ours = scorer(ragged()).logps_N
    grads = gradients(ours, model)
    with scorer.native():
        own = completion_logprobs(model, ragged(), device=CPU)
    assert_equal((ours, grads), (own, gradients(own, model)))


def test_an_mlp_and_projections_of_no_token_give_nothing() -> None:
    model = with_adapter(build("llama"))
    shortcuts.take(model.get_base_model())
    layer = model.get_base_model().model.layers[0]
    empty = torch.zeros(1, 0, 64)
    assert layer.mlp(empty).shape == layer.self_attn.q_proj(empty).shape == (1, 0, 64)
