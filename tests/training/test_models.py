"""What may be trained, and where dropout may live."""

import pytest
import torch

from dpo_loop.config import LoraShape
from dpo_loop.errors import PolicyError
from dpo_loop.training.models import add_adapter, build_accelerator, load_base, set_training_mode, trainable_parameters
from dpo_loop.types import PolicyRef


def test_a_parameter_that_peft_left_trainable_is_found(base: PolicyRef) -> None:
    """T15: leaving `disable_adapter()` or switching adapters turns gradients on where nobody asked for them."""
    model = add_adapter(load_base(base.base, accelerator=build_accelerator("float32"), frozen=True), LoraShape(rank=2), seed=0)
    assert all(".lora_" in name for name in trainable_parameters(model, adapter_only=True))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(PolicyError, match=r"unexpected \['base_model.model.lm_head.weight'\]"):
        trainable_parameters(model, adapter_only=True)
    model.requires_grad_(False)
    with pytest.raises(PolicyError, match="missing"):
        trainable_parameters(model, adapter_only=True)


def test_dropout_is_live_in_lora_layers_only(base: PolicyRef) -> None:
    """T26: any other dropout would make the policy differ from its own reference."""
    bare = load_base(base.base, accelerator=build_accelerator("float32"), frozen=True)
    bare.model.layers[0].mlp.extra = torch.nn.Dropout(0.5)
    model = add_adapter(bare, LoraShape(rank=2, dropout=0.1), seed=0)
    set_training_mode(model, gradient_checkpointing=False)
    live = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout) and module.training]
    assert live
    assert all("lora_dropout" in name for name in live)


def test_a_fresh_adapter_is_a_function_of_its_seed_and_says_what_the_base_says(base: PolicyRef) -> None:
    accelerator = build_accelerator("float32")
    made = [add_adapter(load_base(base.base, accelerator=accelerator, frozen=True), LoraShape(rank=2), seed=s) for s in (3, 3, 4)]
    one, same, other = (torch.cat([p.flatten() for n, p in m.named_parameters() if ".lora_A." in n]) for m in made)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    ids = torch.tensor([[5, 6, 7]])
    bare = load_base(base.base, accelerator=accelerator, frozen=True)
    assert torch.equal(made[0](ids).logits, bare(ids).logits)
