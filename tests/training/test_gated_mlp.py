"""A gated MLP as one function: the same values and gradients, half of what is kept, and nothing taken for one that is none."""

from functools import partial
from typing import Any

import pytest
import torch

from dpo_loop.training.forward import gated_mlp, shortcuts
from tests.training.families import build, replaced, with_adapter


@pytest.mark.parametrize(
    ("family", "mlps"), [("llama", 2), ("gemma2", 2), ("qwen3", 2), ("opt, learned positions", 0), ("gpt_neox", 0)]
)
def test_gated_mlps_compute_the_same_and_keep_less(family: str, mlps: int) -> None:
    model = with_adapter(build(family))
    bare = model.get_base_model()
    gated_mlp.speed_up(bare)
    names = replaced(bare)
    assert len(names) == mlps
    if not mlps:
        return
    kept: list[list[int]] = []
    results = []
    for fast in (False, True):
        (shortcuts.take if fast else shortcuts.leave)(bare)
        mlp = bare.get_submodule(names[0])
        x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=sizes: (to.append(t.numel()), t)[1], lambda t: t):
            out = mlp(x)
        inner = 9 * mlp.gate_proj.base_layer.out_features
        kept.append([size for size in sizes if size == inner])
        adapters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
        assert len(adapters) == 6
        results.append([out, *torch.autograd.grad(out.sin().sum(), [x, *adapters])])
    for theirs, ours in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(kept[1]) == 2 < len(kept[0])
    shortcuts.leave(bare)
    assert replaced(bare) == []


@pytest.mark.parametrize("limit", [16.0, 0.01])
def test_an_mlp_that_clamps_what_it_opens_is_left_alone(limit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama")).get_base_model()

    def clamped(self: Any, x: torch.Tensor) -> torch.Tensor:
        opened: torch.Tensor = self.act_fn(self.gate_proj(x)).clamp(max=limit) * self.up_proj(x).clamp(-limit, limit)
        return self.down_proj(opened)  # type: ignore[no-any-return]

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", clamped)
    gated_mlp.speed_up(model)
    assert replaced(model) == []


class _Same(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)


@pytest.mark.parametrize("act", [_Same(), torch.nn.Identity(), torch.nn.ReLU(inplace=True), torch.nn.PReLU()])
def test_an_activation_that_changes_its_input_or_learns_is_left_to_the_module(act: torch.nn.Module) -> None:
    model = with_adapter(build("llama")).get_base_model()
    for layer in model.model.layers:
        layer.mlp.act_fn = act
    gated_mlp.speed_up(model)
    assert replaced(model) == []


@pytest.mark.parametrize("act", [torch.nn.Tanh(), torch.nn.GELU("tanh"), torch.nn.ReLU()])
@pytest.mark.parametrize("wide", [False, True])
def test_any_activation_in_any_width_has_its_gradient(act: torch.nn.Module, wide: bool) -> None:
    """wide: computed in fp32 and given back so, though gate and up are bf16, as some are under autocast."""
    model = with_adapter(build("llama").bfloat16() if wide else build("llama")).get_base_model()
    mlp = model.model.layers[0].mlp
    del mlp.act_fn
    mlp.act_fn = lambda x: act(x.float()) if wide else act(x)
    x = torch.randn(
        1, 9, 64, generator=torch.Generator().manual_seed(1), dtype=torch.bfloat16 if wide else torch.float32, requires_grad=True
    )
    adapters = [parameter for parameter in mlp.parameters() if parameter.requires_grad]
    results = []
    for fast in (False, True):
        if fast:
            mlp.forward = partial(gated_mlp._forward, mlp)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=wide):
            out = mlp(x)
        results.append([out.detach(), *torch.autograd.grad(out.float().sin().sum(), [x, *adapters])])
    for theirs, ours in zip(*results, strict=True):
        assert float((ours.float() - theirs.float()).norm() / theirs.float().norm()) < (3e-2 if wide else 1e-5)


def test_a_gated_mlp_can_be_pulled_back_twice() -> None:
    model = with_adapter(build("llama"))
    shortcuts.take(model.get_base_model())
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 4, 64, requires_grad=True)
    out = mlp(x).sum()
    (once,) = torch.autograd.grad(out, x, retain_graph=True)
    (again,) = torch.autograd.grad(out, x)
    assert torch.equal(once, again)


def test_an_mlp_that_is_another_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama")).get_base_model()
    mlp = model.model.layers[0].mlp
    right = type(mlp).forward
    monkeypatch.setattr(type(mlp), "forward", lambda self, x: right(self, x).clamp(max=0.01))
    gated_mlp.speed_up(model)
    assert "forward" not in vars(mlp)
    monkeypatch.setattr(type(mlp), "forward", lambda self, x, gates: right(self, x) * gates)
    gated_mlp.speed_up(model)
    assert "forward" not in vars(mlp)


def test_an_mlp_with_dropout_or_with_its_adapter_off_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapter(build("llama"))
    shortcuts.take(model.get_base_model())
    mlp = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 4, 64)
    with torch.no_grad(), model.disable_adapter():
        bare = mlp(x)
        assert torch.equal(bare, type(mlp).forward(mlp, x))
    assert not torch.allclose(bare, mlp(x), atol=1e-3)
    mlp.down_proj.lora_dropout["default"] = torch.nn.Dropout(0.5)
    mlp.train()
    assert not torch.equal(mlp(x), mlp(x))
    gated_mlp.restore(model)
    gated_mlp.speed_up(model)
    assert "forward" in vars(mlp), "what a module is does not depend on what it does just now"
