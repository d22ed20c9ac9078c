"""What is computed faster than by a model's own modules: the same values and gradients, only where it is known to be the same, and gone on demand."""

from functools import partial
from typing import Any

import pytest
import torch

from dpo_loop.training.forward import gated_mlp, last_mlp, lora_linear, rms_norm, rotary, shortcuts, tree_attention
from dpo_loop.training.forward.logprobs import completion_logprobs
from dpo_loop.training.forward.packing import Span
from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.training.models import set_training_mode
from tests.training.families import build, with_adapter
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


def replaced(model: Any) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


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


def test_the_last_mlp_sees_only_what_is_scored() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    assert scorer.packed
    mlp = model.get_base_model().model.layers[-1].mlp
    seen: list[int] = []
    mlp.act_fn.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-2]))
    ours = scorer(ragged()).logps_N
    grads = gradients(ours, model)
    last_mlp.restore(model.get_base_model())
    whole = scorer(ragged()).logps_N
    assert_equal((ours, grads), (whole, gradients(whole, model)))
    assert seen[0] < seen[-1]


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
    assert len(tree_attention._causal(Span(0, 16))) == 15
    cut = scorer(ragged()).logps_N
    assert_equal((cut, gradients(cut, model)), (whole, grads))


# ------------------------------------------------------------------------------------------------------ layers that go together


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


# ------------------------------------------------------------------------------------------------------------------- gated MLPs


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


def test_shortcuts_can_be_taken_twice() -> None:
    model = with_adapter(build("llama"))
    scorer = build_scorer(model, device=CPU, forward="auto")
    once = scorer(ragged()).logps_N
    shortcuts.take(model.get_base_model())
    assert torch.equal(scorer(ragged()).logps_N, once)


# ------------------------------------------------------------------------------------------------------------- rotary positions


@pytest.mark.parametrize(
    ("family", "attentions"),
    [("llama", 2), ("gemma2", 2), ("qwen3", 2), ("mixtral", 2), ("cohere, logits multiplied", 0), ("gpt_oss, attention sinks", 0)],
)
def test_rotary_positions_that_are_known_are_rotated_the_same(family: str, attentions: int) -> None:
    model = build(family)
    ids = torch.arange(2, 30)[None]
    results = []
    for fast in (False, True):
        (rotary.speed_up if fast else rotary.restore)(model)
        assert len(replaced(model)) == attentions * fast
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = model(inputs_embeds=embedded).logits
        results.append([logits.detach(), *torch.autograd.grad(logits.sin().sum(), embedded)])
    for theirs, ours in zip(*results, strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    rotary.restore(model)
    assert replaced(model) == []


def test_a_rotation_of_another_kind_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    globals_of = type(model.model.layers[0].self_attn).forward.__globals__
    right = globals_of["apply_rotary_pos_emb"]
    monkeypatch.setitem(globals_of, "apply_rotary_pos_emb", lambda q, k, cos, sin: right(q, k, cos, -sin))
    rotary.speed_up(model)
    assert replaced(model) == []
    monkeypatch.setitem(globals_of, "apply_rotary_pos_emb", lambda q, cos, sin: right(q, q, cos, sin))
    rotary.speed_up(model)
    assert replaced(model) == []


def test_rotation_in_bf16_is_left_to_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama").bfloat16()
    ids = torch.arange(2, 30)[None]
    expected = model(ids).logits
    rotary.speed_up(model)
    assert len(replaced(model)) == 2
    assert torch.equal(model(ids).logits, expected)
    globals_of = type(model.model.layers[0].self_attn).forward.__globals__
    assert globals_of["apply_rotary_pos_emb"].__module__ == globals_of["__name__"], "the module of transformers is as it was"
