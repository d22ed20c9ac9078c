"""Packed forward, head and losses against TRL's DPOTrainer on model families that compute attention, logits or layers in their own ways."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dpo_loop.training.forward.probe import build_scorer
from dpo_loop.types import PolicyRef
from tests.training.trl_trainers import Ours, dpo_trainer, lora_shape, move_away_from_the_reference, set_loss

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}


def qwen3() -> Any:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True))


def gemma2() -> Any:
    """Sliding window in every other layer, soft-capped scores and logits; transformers' sdpa forgets the caps of scores."""
    caps = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 5.0, "sliding_window": 8, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, **caps, num_key_value_heads=2, head_dim=16))


def gpt_neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


@pytest.mark.parametrize("family", [qwen3, gemma2, gpt_neox, mixtral])
def test_losses_and_gradients_of_a_family_equal_those_of_trls_dpo_trainer(
    base: PolicyRef, tmp_path: Path, family: Callable[[], Any]
) -> None:
    """base: for its tokenizer."""
    torch.manual_seed(5)
    reference = family().eval()
    # peft has a rank pattern of its own for fused experts, and warns where nothing of "all-linear" matches it.
    target = ["q_proj", "k_proj", "v_proj", "o_proj"] if family is mixtral else "all-linear"
    model = get_peft_model(copy.deepcopy(reference), lora_shape(target)).eval()
    move_away_from_the_reference(model)
    trainer = dpo_trainer(tmp_path, copy.deepcopy(reference), base, peft_config=lora_shape(target))
    # TRL adds the router's load-balancing loss of a mixture of experts by default; it is no preference loss, and ours has none.
    trainer.aux_loss_enabled = False
    ours = Ours(model, build_scorer(model, device=torch.device("cpu"), forward="auto"), reference)
    ours.give_adapter(trainer.model)
    for loss in ({"kind": "sigmoid"}, {"kind": "sigmoid_norm", "wpo": True}, {"kind": "ipo", "ld_alpha": 0.3}):
        objective = ours.pairs(loss)
        set_loss(trainer, objective)
        theirs = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
        ours.assert_equals(trainer.model, theirs, objective)
    assert ours.scorer.packed, ours.scorer.reason
