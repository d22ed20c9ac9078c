"""Items of the local capability tasks, read from the files that people give. Bad lines are all listed, never passed over."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, assert_never

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dpo_loop.config import ExactMatchTask, LocalTask, MultipleChoiceTask, PerplexityTask
from dpo_loop.exchange import MIN_DOCUMENTS
from dpo_loop.types import Message, Prompt, Record, content_id

MAX_LISTED = 20


class Item(Record):
    """A line of a task's file; keys that the task does not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    @property
    def id(self) -> str:
        """A hash of its content."""
        return content_id(type(self).__name__, self.model_dump())


class _Asked(Item):
    prompt: str | None = None
    messages: tuple[Message, ...] = ()

    @model_validator(mode="after")
    def _is_a_conversation(self) -> _Asked:
        if (self.prompt is None) != bool(self.messages):
            raise ValueError('wanted {"prompt": "..."} or {"messages": [...]}, one of the two')
        turns = self.conversation.messages
        if turns[-1].role != "user" or not all(turn.content.strip() for turn in turns):
            raise ValueError("the conversation must end with a user turn, and no turn may be empty")
        return self

    @property
    def conversation(self) -> Prompt:
        asked = (Message(role="user", content=self.prompt),) if self.prompt is not None else self.messages
        return Prompt.build(asked, source="capability")


def _listed(answer: Any) -> Any:
    return [answer] if isinstance(answer, str) else answer


class ExactMatchItem(_Asked):
    answer: Annotated[tuple[str, ...], BeforeValidator(_listed), Field(strict=False)]

    @model_validator(mode="after")
    def _says_something(self) -> ExactMatchItem:
        if not self.answer or not all(text.strip() for text in self.answer):
            raise ValueError("there is no accepted answer, or an empty one")
        return self


class MultipleChoiceItem(_Asked):
    choices: Annotated[tuple[str, ...], Field(min_length=2)]
    answer: int

    @model_validator(mode="after")
    def _can_be_chosen(self) -> MultipleChoiceItem:
        if not all(self.choices) or len(set(self.choices)) < len(self.choices):
            raise ValueError("a choice is empty, or there twice")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices; they are counted from 0")
        return self


class Document(Item):
    text: str

    @model_validator(mode="after")
    def _says_something(self) -> Document:
        if not self.text.strip():
            raise ValueError("a text without a word")
        return self


def read_items(task: LocalTask, file: Path) -> tuple[tuple[Item, ...], list[str]]:
    """Items in the order of the file, no two alike; and what is wrong with it, a sentence each."""
    match task:
        case ExactMatchTask():
            kind: type[Item] = ExactMatchItem
        case MultipleChoiceTask():
            kind = MultipleChoiceItem
        case PerplexityTask():
            kind = Document
        case _:
            assert_never(task)
    data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = data.decode().split("\n")
    except UnicodeDecodeError as error:
        return (), [f"{file}:{data.count(10, 0, error.start) + 1}: not UTF-8; save the file as UTF-8"]
    lines = _documents(rows) if kind is Document and file.suffix != ".jsonl" else enumerate(rows, start=1)
    items: dict[str, tuple[int, Item]] = {}
    bad = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            item = kind.model_validate_json(line)
        except ValidationError as error:
            bad.append((number, _reason(error)))
            continue
        first, _ = items.setdefault(item.id, (number, item))
        if first != number:
            bad.append((number, f"the same as line {first}; remove one of them"))
    if not items and not bad:
        bad = [(1, "the file holds no item")]
    problems = _problems(file, bad)
    if kind is Document and not bad and (few := too_few_documents(task.id, len(items))):
        problems = [f"{file}: {few}"]
    return tuple(item for _, item in items.values()), problems


def too_few_documents(task_id: str, num: int) -> str | None:
    """What is wrong with so few documents of a perplexity, and the way out; None where they are enough."""
    if num >= MIN_DOCUMENTS:
        return None
    return (
        f"capability task {task_id} has {num} documents, and by how much a perplexity changed over fewer than {MIN_DOCUMENTS} says nothing; "
        "add documents, or divide long ones"
    )


def _documents(rows: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(number of its first line, {"text": ...}) of each document in plain text."""
    lines: list[str] = []
    for number, row in enumerate([*rows, ""], start=1):
        if row.strip():
            lines.append(row.removesuffix("\r"))
        elif lines:
            yield number - len(lines), json.dumps({"text": "\n".join(lines)})
            lines = []


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else first["msg"].removeprefix("Value error, ")


def _problems(file: Path, bad: Sequence[tuple[int, str]]) -> list[str]:
    listed = [f"{file}:{number}: {reason}" for number, reason in bad[:MAX_LISTED]]
    return [*listed, f"{file}: and {len(bad) - MAX_LISTED} more lines"] if len(bad) > MAX_LISTED else listed
