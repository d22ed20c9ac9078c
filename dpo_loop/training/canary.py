"""Log-probs that an engine must reproduce before it may serve a policy (design §6), written by transformers + peft.

canary.json: {"base_sha256", "adapter_sha256", "tolerance_hint", "sequences": [{"prompt_token_ids", "token_ids", "policy_logprobs",
"base_logprobs" or null}]}; log-probs per token, nats, at temperature 1. base_logprobs are those of the bare base: an engine that
drops the adapter without a word is closer to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dpo_loop.files import write_json
from dpo_loop.training.forward.logprobs import completion_logprobs
from dpo_loop.training.forward.sequences import TokenSequence

NUM_SEQUENCES = 8
MAX_COMPLETION_TOKENS = 64
_FALLBACK = (
    ("Name three primary colours.", "Red, yellow and blue."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Write one sentence about the sea.", "The sea was calm and grey under a low sky."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("Say hello in Spanish.", "Hola."),
    ("What is 12 times 12?", "12 times 12 is 144."),
    ("Which planet is closest to the sun?", "Mercury is the planet closest to the sun."),
    ("List two fruits and one vegetable.", "Apples, pears and a carrot."),
)


def pick_sequences(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    """NUM_SEQUENCES of them, evenly spread, their completions cut to MAX_COMPLETION_TOKENS."""
    count = min(NUM_SEQUENCES, len(sequences))
    chosen = [sequences[index * len(sequences) // count] for index in range(count)]
    return [TokenSequence(prompt, completion[:MAX_COMPLETION_TOKENS]) for prompt, completion in chosen]


def everyday_sequences(tokenizer: Any) -> list[TokenSequence]:
    """For a start policy that comes without any text of its own."""
    sequences = []
    for question, answer in _FALLBACK:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        sequences.append(TokenSequence(tuple(prompt), tuple(tokenizer.encode(answer, add_special_tokens=False))))
    return sequences


def write_canary(
    path: Path,
    model: Any,
    sequences: Sequence[TokenSequence],
    *,
    base_sha256: str,
    adapter_sha256: str | None,
    accelerator: Any,
) -> None:
    """model: a transformers model, or a PEFT model with the one adapter that adapter_sha256 names."""
    rows = []
    for sequence in sequences:
        rows.append(
            {
                "prompt_token_ids": list(sequence.prompt),
                "token_ids": list(sequence.completion),
                "policy_logprobs": _score(model, sequence, accelerator, bare=False),
                "base_logprobs": None if adapter_sha256 is None else _score(model, sequence, accelerator, bare=True),
            }
        )
    write_json(
        path,
        {
            "base_sha256": base_sha256,
            "adapter_sha256": adapter_sha256,
            "tolerance_hint": 5e-2 if accelerator.mixed_precision == "bf16" else 1e-3,
            "sequences": rows,
        },
    )


def _score(model: Any, sequence: TokenSequence, accelerator: Any, *, bare: bool) -> list[float]:
    with torch.no_grad(), accelerator.autocast(), model.disable_adapter() if bare else nullcontext():
        logps: list[float] = completion_logprobs(model, [sequence], device=accelerator.device).tolist()
        return logps
