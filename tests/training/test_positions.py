"""Sequences are never longer than the model can take, whatever the config says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, OPTConfig, OPTForCausalLM

from dpo_loop.artifacts import materialize
from dpo_loop.config import SftConfig, SftStart
from dpo_loop.policies import describe_policy
from dpo_loop.training.positions import longest_length, num_positions
from dpo_loop.training.seed import SEED
from tests.builders import build_model, build_tokenizer
from tests.training.world import END, make_pair, make_pairs, train, training_config, write_pairs

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2_048, "rope_theta": 10_000.0}


@pytest.mark.parametrize(
    ("model_type", "settings", "expected"),
    [
        ("llama", {"max_position_embeddings": 4_096}, 4_096),
        ("gpt2", {"n_positions": 77}, 77),
        ("opt", {"max_position_embeddings": 64}, 64),
        ("mpt", {"max_seq_len": 96}, 96),
        ("bloom", {}, None),
        ("mamba", {}, None),
        ("llama", {"max_position_embeddings": 2_048, "rope_parameters": YARN}, 8_192),
        ("llama", {"max_position_embeddings": 8_192, "rope_parameters": YARN}, 8_192),
        (
            "llama",
            {
                "max_position_embeddings": 16_384,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8_192,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 5e5,
                },
            },
            16_384,
        ),
        ("gemma3_text", {"max_position_embeddings": 512}, 512),
    ],
)
def test_what_a_model_can_take_is_in_its_config(
    tmp_path: Path, model_type: str, settings: dict[str, Any], expected: int | None
) -> None:
    AutoConfig.for_model(model_type, **settings).save_pretrained(tmp_path)
    assert num_positions(str(tmp_path)) == expected


def test_a_shorter_limit_of_the_model_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    AutoConfig.for_model("opt", max_position_embeddings=64).save_pretrained(tmp_path)
    assert longest_length(64, str(tmp_path), stage="train") == 64
    assert capsys.readouterr().out == ""
    assert longest_length(65, str(tmp_path), stage="train") == 64
    assert capsys.readouterr().out == "train: sequences of at most 64 tokens, for which the model has positions; max_length is 65\n"


def opt(folder: Path) -> Path:
    """Learned positions, of which there are 32."""
    build_tokenizer(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 64}
    config = OPTConfig(
        vocab_size=320, max_position_embeddings=32, dropout=0.0, pad_token_id=1, eos_token_id=0, bos_token_id=0, **shape
    )
    OPTForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loss", [{"kind": "sigmoid"}, {"kind": "kto"}])
def test_pairs_past_the_models_positions_are_dropped_and_counted(
    tmp_path: Path, loss: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """They ended in an IndexError of the table, which names neither pair nor key; so did KTO's mismatched sequences."""
    past = make_pair("past", prompt=(5,) * 20, chosen=(6,) * 12 + (END,), rejected=(7,))
    fits = make_pair("fits", prompt=(5,) * 20, chosen=(6,) * 11 + (END,), rejected=(7,))
    pairs = write_pairs(tmp_path / "pair", [past, fits, *make_pairs(8, max_completion=12)])
    policy = describe_policy(opt(tmp_path / "model"))
    manifest = train(tmp_path, pairs=pairs, policy=policy, config=training_config(max_length=128, loss=loss))
    assert manifest.outcome.tallies[0].parts == {"trained": 9, "too_long": 1}
    assert "train: sequences of at most 32 tokens" in capsys.readouterr().out


def test_demonstrations_past_the_models_positions_are_dropped_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]}
        for answer in ("five", "x" * 100)
    ]
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = build_model(tmp_path / "model", max_positions=40)
    start = SftStart(kind="sft", model="m", demonstrations="d", sft=SftConfig(dtype="float32", max_length=2_048))
    manifest = materialize(SEED, tmp_path / "seed", start=start, model=model, adapter=None, demonstrations=path)
    assert manifest.outcome.tallies[0].parts == {"trained": 1, "too_long": 1}
    assert "seed: sequences of at most 40 tokens" in capsys.readouterr().out
