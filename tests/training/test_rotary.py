"""Rotary positions in fewer passes, only where they are known to be the same, without a change to the modules of transformers."""

import pytest
import torch

from dpo_loop.training.forward import rotary
from tests.training.families import build, replaced


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
