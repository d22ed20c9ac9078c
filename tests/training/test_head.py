"""The chunked head against autograd through all logits."""

import pytest
import torch

from dpo_loop.training.forward import head as heads
from dpo_loop.training.forward.head import Head, head_of, token_logprobs
from tests.training.families import build

N, H, V = 150, 16, 40


def problem(*, bias: bool, scale: float, cap: float | None, trained: bool) -> tuple[torch.Tensor, torch.Tensor, Head]:
    draw = torch.Generator().manual_seed(2)
    hidden = torch.randn(N, H, generator=draw, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(V, H, generator=draw).requires_grad_(trained)
    made = Head(weight, torch.randn(V, generator=draw) if bias else None, scale, cap)
    return hidden, torch.randint(V, (N,), generator=draw), made


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("bias", "scale", "cap"), [(False, 1.0, None), (True, 1.0, None), (False, 0.25, None), (True, 2.0, 3.0)])
def test_log_probs_and_gradients_are_those_of_all_logits(bias: bool, scale: float, cap: float | None, trained: bool) -> None:
    hidden, targets, made = problem(bias=bias, scale=scale, cap=cap, trained=trained)
    wanted = [hidden, made.weight] if trained else [hidden]
    weights = torch.randn(N, generator=torch.Generator().manual_seed(3))
    ours, collisions = token_logprobs(hidden, targets, made, with_collisions=True)
    ours_grads = torch.autograd.grad((ours * weights).sum(), wanted)
    logits = torch.nn.functional.linear(hidden, made.weight, made.bias) * scale
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    expected = logits.log_softmax(-1)
    theirs = expected.gather(1, targets[:, None]).squeeze(1)
    theirs_grads = torch.autograd.grad((theirs * weights).sum(), wanted)
    assert torch.allclose(ours, theirs, atol=2e-5)
    assert torch.allclose(collisions, expected.exp().square().sum(-1).log(), atol=1e-4)
    for a, b in zip(ours_grads, theirs_grads, strict=True):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


def test_a_chunk_is_all_that_is_ever_as_wide_as_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    widest = []
    real = heads._scores

    def counted(hidden: torch.Tensor, *args: object, **kwargs: object) -> object:
        widest.append(len(hidden))
        return real(hidden, *args, **kwargs)

    monkeypatch.setattr(heads, "_scores", counted)
    hidden, targets, _ = problem(bias=False, scale=1.0, cap=None, trained=False)
    wide = Head(torch.randn(1 << 15, H), None, 1.0, None)
    token_logprobs(hidden, targets, wide, with_collisions=False)
    assert widest == [64, 64, 22]


@pytest.mark.parametrize(
    ("family", "scale", "cap"),
    [
        ("llama", 1.0, None),
        ("gemma2", 1.0, 5.0),
        ("granite, logits divided", 0.25, None),
        ("cohere, logits multiplied", 0.25, None),
    ],
)
def test_scale_and_cap_are_read_from_the_model(family: str, scale: float, cap: float | None) -> None:
    found = head_of(build(family))
    assert found is not None
    assert (found.scale, found.cap) == (scale, cap)


def test_a_head_that_is_not_one_linear_layer_is_left_to_the_model() -> None:
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert head_of(model) is None
