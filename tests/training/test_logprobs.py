"""The one producer of per-token log-probs against plain unpadded forwards."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from dpo_loop.training.forward.logprobs import completion_logprobs
from dpo_loop.training.forward.sequences import TokenSequence, sum_by_sequence
from dpo_loop.training.models import build_accelerator, load_base
from dpo_loop.types import PolicyRef
from tests.training.world import make_pairs

CPU = torch.device("cpu")


def ragged() -> list[TokenSequence]:
    """Ragged lengths, with a one-token prompt and a one-token completion among them."""
    sequences = [TokenSequence(pair.prompt_token_ids, pair.chosen_token_ids) for pair in make_pairs(12, seed=8)]
    return [*sequences, TokenSequence((7,), (9,)), TokenSequence((7,), (9, 11, 0)), TokenSequence((5, 6, 7), (0,))]


def plain(model: torch.nn.Module, sequence: TokenSequence) -> torch.Tensor:
    logps = model(torch.tensor([sequence.prompt + sequence.completion])).logits[0].log_softmax(-1)
    positions = torch.arange(len(sequence.completion)) + len(sequence.prompt) - 1
    return logps[positions, torch.tensor(sequence.completion)]


def test_padded_log_probs_equal_one_forward_per_sequence(base: PolicyRef) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.base, dtype=torch.float32).eval()
    expected = torch.cat([plain(model, sequence) for sequence in ragged()])
    assert torch.allclose(completion_logprobs(model, ragged(), device=CPU), expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_neox"])
def test_the_head_keeps_the_scaling_and_soft_cap_of_its_family(family: str, tmp_path) -> None:
    """Soft-capped logits, sliding windows and attention soft-cap (Gemma 2); another name for the head (GPT-NeoX)."""
    torch.manual_seed(0)
    shape = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": 1, "eos_token_id": 0, "bos_token_id": 0}
    if family == "gemma2":
        caps = {"final_logit_softcapping": 0.5, "attn_logit_softcapping": 0.5, "sliding_window": 8}
        made = Gemma2ForCausalLM(Gemma2Config(**shape, **ids, **caps, num_key_value_heads=1, head_dim=16, initializer_range=0.5))
    else:
        made = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, **ids, initializer_range=0.5))
    made.save_pretrained(tmp_path)
    model = load_base(str(tmp_path), accelerator=build_accelerator("float32"), frozen=True)
    eager = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    expected = torch.cat([plain(eager, sequence) for sequence in ragged()])
    assert torch.allclose(completion_logprobs(model, ragged(), device=CPU), expected, atol=1e-4)


def test_the_head_is_computed_at_completion_positions_only(base: PolicyRef) -> None:
    model = AutoModelForCausalLM.from_pretrained(base.base, dtype=torch.float32)
    seen: list[int] = []
    model.get_output_embeddings().register_forward_hook(lambda _module, args, _out: seen.append(args[0].shape[1]))
    logps = completion_logprobs(model, ragged(), device=CPU)
    assert seen == [len(logps)] == [sum(len(sequence.completion) for sequence in ragged())]
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 320)  # nothing is left behind on the model


def test_sums_go_to_the_sequence_that_owns_the_tokens() -> None:
    sequences = [TokenSequence((1,), (2, 3)), TokenSequence((1,), (4,)), TokenSequence((1,), (5, 6, 7))]
    #                                  └──┬──┘   │    └────┬────┘
    values = torch.tensor([1.0, 2.0, 10.0, 100.0, 200.0, 300.0])
    assert sum_by_sequence(values, sequences).tolist() == [3.0, 10.0, 600.0]
