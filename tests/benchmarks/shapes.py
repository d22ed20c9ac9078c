"""What the training benchmarks run on: randomly initialised models of known shapes, ragged pairs of random token ids, an adapter whose B is
not zero. All of it is a pure function of its seeds, so two processes make the same without exchanging it.

`python -m tests.benchmarks.shapes 25m DIR [--device cuda]` writes a model directory.
"""

from __future__ import annotations

import argparse
import random
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

RAGGED = 0.25
"""Lengths are drawn evenly from so far below to so far above what a case names."""


class Case(NamedTuple):
    """Tokens of a prompt and of a completion, about."""

    prompt: int
    completion: int


class IdPair(NamedTuple):
    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def shape(name: str) -> PretrainedConfig:
    """25m: facts/training.md §9. 1.5b: Qwen2.5-1.5B. 7b: Llama 2 7B. No end-of-sequence or padding id: nothing is generated here."""
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    match name:
        case "25m":
            return LlamaConfig(
                vocab_size=4_096, hidden_size=512, intermediate_size=1_408, num_hidden_layers=8, num_attention_heads=8,
                num_key_value_heads=4, max_position_embeddings=2_048, tie_word_embeddings=True, **no_ids,
            )  # fmt: skip
        case "1.5b":
            return Qwen2Config(
                vocab_size=151_936, hidden_size=1_536, intermediate_size=8_960, num_hidden_layers=28, num_attention_heads=12,
                num_key_value_heads=2, max_position_embeddings=32_768, tie_word_embeddings=True, **no_ids,
            )  # fmt: skip
        case "7b":
            return LlamaConfig(
                vocab_size=32_000, hidden_size=4_096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=32, max_position_embeddings=4_096, tie_word_embeddings=False, **no_ids,
            )  # fmt: skip
    raise SystemExit(f"there is no shape {name!r}; known: 25m, 1.5b, 7b")


def build_shape(name: str, out: Path, *, device: str, seed: int = 0) -> None:
    """A transformers model directory of random weights: fp32 from a CPU, bf16 from a GPU. Without a tokenizer."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape(name), dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    model.save_pretrained(out)


def vocabulary(model: Path) -> int:
    """Ids below this are in the model's embedding."""
    return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)


def draw_pairs(case: Case, num_pairs: int, *, vocab_size: int, seed: int = 0) -> list[IdPair]:
    """Ragged pairs of random ids, of which 0 is left out: it pads TRL's rows."""
    draw = random.Random(f"{seed}/{case.prompt}/{case.completion}")

    def ids(about: int) -> tuple[int, ...]:
        length = draw.randint(max(1, round(about * (1 - RAGGED))), max(1, round(about * (1 + RAGGED))))
        return tuple(draw.randrange(1, vocab_size) for _ in range(length))

    return [IdPair(ids(case.prompt), ids(case.completion), ids(case.completion)) for _ in range(num_pairs)]


def move_adapter(model: Any, *, seed: int = 0) -> None:
    """LoRA weights away from B = 0, so that no gradient vanishes: A of unit gain, B of a size that moves log-probs but drowns nothing.

    Every tensor is drawn from its name, whatever order a library lists them in.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                noise = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
                std = 0.02 if ".lora_B." in name else parameter.shape[-1] ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * std)


def relative_l2(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """||ours - theirs|| / ||theirs|| over all tensors. Raises SystemExit if they are not the same tensors: then nothing was compared."""
    if ours.keys() != theirs.keys() or not theirs:
        raise SystemExit(f"not the same parameters on both sides: {sorted(ours.keys() ^ theirs.keys())[:4]}")
    difference = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in theirs)
    return float((difference / sum(float(grad.double().square().sum()) for grad in theirs.values())) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a model directory of random weights.")
    parser.add_argument("shape")
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    build_shape(given.shape, given.out, device=given.device)


if __name__ == "__main__":
    main()
