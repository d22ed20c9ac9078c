"""Supervised fine-tuning on demonstrations: completion-only loss on assistant turns, full weights or LoRA.

A demonstration is {"messages": [...]} ending with an assistant turn. What is trained on is what generation will ask for: the prompt is
the chat template with the generation prompt, the completion is the assistant's tokens with its end-of-turn token. What a
template writes after the end of the turn (often a newline) is never scored. `last_turn` learns the last assistant turn and takes the earlier
ones as context; `all_turns` learns each in one sequence: from the first answer on everything is "completion", of which only answers are scored.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jinja2 import TemplateError
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig

from dpo_loop.errors import InputError
from dpo_loop.training.forward.logprobs import Scorer
from dpo_loop.training.forward.sequences import TokenSequence
from dpo_loop.training.model_checks import check_token_ids, vocabulary_size
from dpo_loop.types import Message, Record, Tally

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
_Chat = list[dict[str, str]]


class Demonstration(Record):
    messages: tuple[Message, ...]


class SftExample(NamedTuple):
    """sequence.prompt: all before the first answer that is learnt. scored: of each token of sequence.completion, whether it is learnt."""

    sequence: TokenSequence
    scored: tuple[bool, ...]


class _Rendered(NamedTuple):
    """A demonstration as token ids, and where the answers that are learnt lie in them; no spans where the template does not say it stably."""

    ids: list[int]
    spans: list[range]


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Raises InputError with the number and the reason of the first line that is not a demonstration."""
    found = []
    for number, line in enumerate(lines_of(path), start=1):
        try:
            row = Demonstration.model_validate({"messages": json.loads(line)["messages"]})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f'{path}:{number} is not a demonstration: {_reason(error)}. Expected {{"messages": [...]}}') from error
        if len(row.messages) < 2 or row.messages[-1].role != "assistant" or not row.messages[-1].content.strip():
            raise InputError(f"{path}:{number} does not end with an assistant turn that says something after a user turn")
        found.append(row)
    if not found:
        raise InputError(f"{path} holds no demonstrations")
    return found


def lines_of(path: Path) -> list[bytes]:
    """Of a file that people write: without the blank lines that editors leave at its end."""
    text = path.read_bytes().rstrip()
    return text.split(b"\n") if text else []


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return str(error.errors()[0]["msg"])
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def tokenize(
    demonstrations: Sequence[Demonstration],
    model_dir: str,
    *,
    max_length: int,
    train_on: Literal["last_turn", "all_turns"],
    where: Path,
) -> tuple[list[SftExample], Tally]:
    """Demonstrations as token ids, and a count of those that `render` gives a reason for. Raises InputError as it does, or if none is left."""
    found = render(demonstrations, model_dir, max_length=max_length, train_on=train_on, where=where)
    fates = Counter(each if isinstance(each, str) else "trained" for each in found)
    if not fates["trained"]:
        raise InputError(
            f"none of {len(found)} demonstrations can be trained on: {dict(fates)}; see max_length and the chat template"
        )
    examples = [each for each in found if not isinstance(each, str)]
    return examples, Tally(of="demonstrations", total=len(found), parts=dict(fates))


def render(
    demonstrations: Sequence[Demonstration],
    model_dir: str,
    *,
    max_length: int,
    train_on: Literal["last_turn", "all_turns"],
    where: Path,
) -> list[SftExample | str]:
    """Each demonstration as token ids, or why it cannot be trained on: too_long, or template_mismatch where the template does not continue
    its own prompt.

    `all_turns` takes the template's own {% generation %} marks where it has them, else it renders turn by turn. where: the file that
    holds one demonstration a line. Raises InputError for one that the template refuses, or with tokens that the model does not know.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ends = end_of_turn_ids(tokenizer, model_dir)
    chats = [[message.model_dump() for message in row.messages] for row in demonstrations]
    if train_on == "all_turns" and _GENERATION_TAG.search(tokenizer.get_chat_template()):
        rendered = list(_marked(tokenizer, chats, ends))
    else:
        rendered = list(_turn_by_turn(tokenizer, chats, ends, every=train_on == "all_turns"))
    found = [_example(ids, spans) if (reason := _misfit(spans, max_length)) is None else reason for ids, spans in rendered]
    sequences = {f"{where}:{line}": each.sequence for line, each in enumerate(found, start=1) if not isinstance(each, str)}
    check_token_ids(list(sequences.values()), vocabulary_size(model_dir), names=list(sequences))
    return found


def _misfit(spans: Sequence[range], max_length: int) -> str | None:
    if not spans:
        return "template_mismatch"
    return "too_long" if spans[-1].stop > max_length else None


def _example(ids: Sequence[int], spans: Sequence[range]) -> SftExample:
    first, end = spans[0].start, spans[-1].stop
    scored = [False] * (end - first)
    for span in spans:
        for position in span:
            scored[position - first] = True
    return SftExample(TokenSequence(tuple(ids[:first]), tuple(ids[first:end])), tuple(scored))


def _turn_by_turn(tokenizer: Any, chats: Sequence[_Chat], ends: frozenset[int], *, every: bool) -> Iterator[_Rendered]:
    """Each answer is what the template adds to its own generation prompt; the whole must then hold prompt and answer at the same place."""
    turns = [[turn for turn in _answers(chat) if every or turn == len(chat) - 1] for chat in chats]
    prompts = iter(_ids(tokenizer, [chat[:turn] for chat, of in zip(chats, turns, strict=True) for turn in of], prompt=True))
    answered = iter(_ids(tokenizer, [chat[: turn + 1] for chat, of in zip(chats, turns, strict=True) for turn in of], prompt=False))
    for whole, of in zip(_ids(tokenizer, chats, prompt=False), turns, strict=True):
        spans, stable = [], True
        for _ in of:
            prompt, upto = next(prompts), next(answered)
            completion = _up_to_end_of_turn(upto[len(prompt) :], ends)
            end = len(prompt) + len(completion)
            stable &= bool(prompt and completion) and upto[: len(prompt)] == prompt and whole[:end] == upto[:end]
            spans.append(range(len(prompt), end))
        yield _Rendered(whole, spans if stable else [])


def _answers(chat: _Chat) -> list[int]:
    """Assistant turns that say something to somebody; an opening one answers nothing and stays context."""
    return [turn for turn, each in enumerate(chat) if turn and each["role"] == "assistant" and each["content"].strip()]


def _marked(tokenizer: Any, chats: Sequence[_Chat], ends: frozenset[int]) -> Iterator[_Rendered]:
    """Answers as the template marks them, up to their end-of-turn token: also where the mark ends just before it, else it would never be learnt."""
    for chat in chats:
        try:
            found = tokenizer.apply_chat_template([chat], return_dict=True, return_assistant_tokens_mask=True)
        except TemplateError as error:
            raise _refused(chat, error) from error
        (ids,), (mask,) = found["input_ids"], found["assistant_masks"]
        spans = []
        for is_answer, positions in groupby(range(len(ids)), key=lambda position: mask[position]):
            run = list(positions)
            start, end = max(run[0], 1), run[-1] + 1  # the very first token has nothing before it
            if not is_answer:
                continue
            if not ends.intersection(ids[start:end]):
                end += end < len(ids) and ids[end] in ends
            else:
                end = start + len(_up_to_end_of_turn(ids[start:end], ends))
            if not ends.issuperset(ids[start:end]):
                spans.append(range(start, end))
        yield _Rendered(ids, spans)


def _ids(tokenizer: Any, chats: Sequence[_Chat], *, prompt: bool) -> list[list[int]]:
    """Raises InputError with the chat that the template refuses, such as roles that do not alternate."""
    try:
        found: list[list[int]] = tokenizer.apply_chat_template(list(chats), add_generation_prompt=prompt, return_dict=False)
    except TemplateError:
        for chat in chats:
            try:
                tokenizer.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
            except TemplateError as error:
                raise _refused(chat, error) from error
        raise
    return found


def _refused(chat: _Chat, error: TemplateError) -> InputError:
    roles, opening = " ".join(each["role"] for each in chat), chat[0]["content"][:60]
    return InputError(
        f"the chat template refuses the demonstration that begins {opening!r} (roles: {roles}): {error}. Mend or remove it"
    )


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
    """Mean negative log-likelihood per scored token of the optimizer step."""

    def __init__(self, scorer: Scorer, examples: Sequence[SftExample]) -> None:
        self.scorer, self.examples = scorer, examples

    def sequences(self, row: int) -> list[TokenSequence]:
        return [self.examples[row].sequence]

    def size(self, rows: Sequence[int]) -> int:
        return sum(sum(self.examples[row].scored) for row in rows)

    def estimates(self, rows: Sequence[int]) -> dict[str, Tensor]:  # noqa: ARG002
        return {}

    def sums(self, rows: Sequence[int], *, estimates: Mapping[str, float]) -> dict[str, Tensor]:  # noqa: ARG002
        logps_N = self.scorer([self.examples[row].sequence for row in rows]).logps_N
        scored_N = torch.tensor([scored for row in rows for scored in self.examples[row].scored], device=logps_N.device)
        return {"loss": -logps_N[scored_N].sum()}

    def metrics(self, sums: Mapping[str, float], rows: Sequence[int], *, step: int) -> dict[str, float]:  # noqa: ARG002
        return {"loss": sums["loss"] / self.size(rows), "examples": len(rows)}
