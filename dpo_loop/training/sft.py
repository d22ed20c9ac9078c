"""Supervised fine-tuning on demonstrations: completion-only loss on the last assistant turn, full weights or LoRA.

A demonstration is {"messages": [...]} ending with an assistant turn. What is trained on is what generation will ask for: the prompt is
the chat template with the generation prompt, the completion is the assistant's tokens with its end-of-turn token. What a
template writes after the end of the turn (often a newline) is left out; earlier assistant turns are context.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from dpo_loop.errors import InputError
from dpo_loop.training.logprobs import completion_logprobs
from dpo_loop.training.sequences import TokenSequence
from dpo_loop.types import Message, Record, Tally


class Demonstration(Record):
    messages: tuple[Message, ...]


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Raises InputError with the number and the reason of the first line that is not a demonstration."""
    found = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = Demonstration.model_validate({"messages": json.loads(line)["messages"]})
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f'{path}:{number} is not a demonstration: {_reason(error)}. Expected {{"messages": [...]}}'
                ) from error
            if len(row.messages) < 2 or row.messages[-1].role != "assistant" or not row.messages[-1].content.strip():
                raise InputError(f"{path}:{number} does not end with an assistant turn that says something after a user turn")
            found.append(row)
    if not found:
        raise InputError(f"{path} holds no demonstrations")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def tokenize(demonstrations: Sequence[Demonstration], model_dir: str, *, max_length: int) -> tuple[list[TokenSequence], Tally]:
    """Demonstrations as token ids; those that are too long, or whose template does not continue its own prompt, are counted out.

    Raises InputError if none is left.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ends = end_of_turn_ids(tokenizer, model_dir)
    chats = [[message.model_dump() for message in row.messages] for row in demonstrations]
    prompts = tokenizer.apply_chat_template([chat[:-1] for chat in chats], add_generation_prompt=True, return_dict=False)
    wholes = tokenizer.apply_chat_template(chats, return_dict=False)
    sequences, fates = [], Counter[str]()
    for prompt, whole in zip(prompts, wholes, strict=True):
        completion = _up_to_end_of_turn(whole[len(prompt) :], ends)
        if whole[: len(prompt)] != prompt or not completion:
            fates["template_mismatch"] += 1
        elif len(prompt) + len(completion) > max_length:
            fates["too_long"] += 1
        else:
            fates["trained"] += 1
            sequences.append(TokenSequence(tuple(prompt), tuple(completion)))
    if not sequences:
        raise InputError(
            f"none of {len(demonstrations)} demonstrations can be trained on: {dict(fates)}; see max_length and the chat template"
        )
    return sequences, Tally(of="demonstrations", total=len(demonstrations), parts=dict(fates))


def end_of_turn_ids(tokenizer: Any, model_dir: str) -> frozenset[int]:
    """The tokens at which an engine stops: the tokenizer's and those of generation_config.json, if the model has one."""
    ids = {tokenizer.eos_token_id}
    if (Path(model_dir) / "generation_config.json").is_file():
        configured = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids |= set(configured) if isinstance(configured, list) else {configured}
    ids.discard(None)
    if not ids:
        raise InputError(f"the tokenizer in {model_dir} has no end-of-turn token; set `tokenizer.eos_token` and save it again")
    return frozenset(ids)


def _up_to_end_of_turn(completion: Sequence[int], ends: frozenset[int]) -> list[int]:
    last = max((index for index, token in enumerate(completion) if token in ends), default=None)
    return [] if last is None else list(completion[: last + 1])


class SftObjective:
    """Mean negative log-likelihood per completion token of the optimizer step."""

    def __init__(self, model: Any, sequences: Sequence[TokenSequence], *, device: torch.device) -> None:
        self.model, self.sequences, self.device = model, sequences, device

    def size(self, rows: Sequence[int]) -> int:
        return sum(len(self.sequences[row].completion) for row in rows)

    def sums(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return {"loss": -completion_logprobs(self.model, [self.sequences[row] for row in rows], device=self.device).sum()}

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:  # noqa: ARG002
        return {"loss": sums["loss"] / self.size(rows), "examples": len(rows)}
