"""A pool of prompts: JSON lines, anything that `datasets.load_dataset` reads, a built-in set or an external one, checked line by line.

A line that cannot be used is never passed over in silence: all of them are listed with number and reason, or, with `skip_bad`,
counted by reason. Those of an external set are only counted, for nobody here can mend them. Two prompts that differ in case or white space only are one question asked twice (`same_question`).
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

from pydantic import ValidationError

from dpo_loop.config import BuiltinPool, ExternalPool, HubPool, JsonlPool, Pool
from dpo_loop.errors import InputError, PromptFileError
from dpo_loop.progress import say
from dpo_loop.prompts.builtin import LICENCE, builtin_rows, source_of
from dpo_loop.prompts.external import external_rows, problems, set_of
from dpo_loop.prompts.hub import load_rows, missing_columns
from dpo_loop.types import Message, Prompt, Side

_MAX_LISTED = 20


@dataclass(frozen=True, slots=True)
class BadLine:
    """number: 1-based, of the line or row. reason: a name that is counted. detail: what a person needs to mend it."""

    number: int
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class PoolContents:
    """source, revision, licence: where the prompts come from, as far as is known. skipped: why an optional set is not there, else ""."""

    prompts: tuple[Prompt, ...]
    bad: tuple[BadLine, ...]
    source: str
    revision: str = ""
    licence: str = ""
    skipped: str = ""

    @property
    def num_lines(self) -> int:
        return len(self.prompts) + len(self.bad)

    @property
    def bad_counts(self) -> dict[str, int]:
        """reason → how many, for a tally"""
        return dict(sorted(Counter(f"bad_{line.reason}" for line in self.bad).items()))


def read_pool(pool: Pool, file: Path | None, *, skip_bad: bool) -> PoolContents:
    """Every prompt of a pool in order, no two alike.

    file: the JSON lines of a JsonlPool; the other kinds know where they are. Raises PromptFileError listing the bad lines unless
    `skip_bad`, and when nothing usable is left; InputError if a data set cannot be loaded, or its licence was not acknowledged. A set that
    is not required and cannot be had is `skipped`.
    """
    match pool:
        case JsonlPool():
            name = str(file or pool.path)
            contents = _contents(_json_rows(file or Path(pool.path)), source=Path(name).name)
        case HubPool():
            name = f"{pool.path} ({pool.split})"
            source = "/".join(filter(None, (pool.path, pool.name, pool.split)))
            contents = replace(_contents(_hub_rows(pool), source=source), revision=pool.revision or "")
        case BuiltinPool():
            name = source_of(pool)
            contents = replace(_contents(builtin_rows(pool), source=name), licence=LICENCE)
        case ExternalPool():
            return _external(pool)
        case _:
            assert_never(pool)
    if contents.bad and not skip_bad:
        raise PromptFileError(_bad_lines_message(name, contents))
    if not contents.prompts:
        raise PromptFileError(_nothing_message(name, contents))
    return contents


def usable_prompts(pool: JsonlPool | BuiltinPool) -> Iterator[Prompt]:
    """One after the other, for a look at what a set has: what cannot be used is passed over, and what is asked twice comes twice.

    Raises PromptFileError if the file is not there.
    """
    if isinstance(pool, BuiltinPool):
        rows, source = builtin_rows(pool), source_of(pool)
    else:
        rows, source = _json_rows(Path(pool.path)), Path(pool.path).name
    for number, row in rows:
        prompt = row if isinstance(row, BadLine) else _prompt(number, row, source)
        if isinstance(prompt, Prompt):
            yield prompt


def normalised(prompt: Prompt) -> str:
    """The conversation with case, white space and Unicode variants folded: equal for the same question typed in two ways."""
    turns = (f"{turn.role} {unicodedata.normalize('NFKC', turn.content).casefold()}" for turn in prompt.messages)
    return "\n".join(" ".join(turn.split()) for turn in turns)


# -------------------------------------------------------------------------------------------------------------- reading


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value or BadLine); blank lines are not prompts and are passed over."""
    try:
        lines = file.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise PromptFileError(
            f"{file} cannot be read: {error.strerror}. Give a file with one JSON object a line, such as "
            '{"prompt": "Why is the sky blue?"}'
        ) from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield number, BadLine(number, "not_utf8", f"byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8")
        except (json.JSONDecodeError, RecursionError) as error:
            yield number, BadLine(number, "not_json", f"not JSON: {error}")


def _hub_rows(pool: HubPool) -> Iterator[tuple[int, Any]]:
    rows = load_rows(pool.path, name=pool.name, split=pool.split, revision=pool.revision, data_files=pool.data_files)
    if missing_columns(rows, [pool.column]):
        raise InputError(
            f"data set {pool.path!r} has no column {pool.column!r}; it has {', '.join(rows.column_names)}. Set `column` (in a new run)."
        )
    for number, row in enumerate(rows, start=1):
        tags = row.get("tags")
        yield number, {"prompt": row[pool.column], "tags": tags if isinstance(tags, dict) else {}}


def _external(pool: ExternalPool) -> PoolContents:
    if told := list(problems(pool)):
        raise InputError("\n".join(f"evaluation set {pool.set}: {line}." for line in told))
    wanted = set_of(pool)
    nothing = PoolContents(prompts=(), bad=(), source=wanted.place, revision=wanted.revision or "", licence=wanted.licence)
    try:
        rows = (
            (number, BadLine(number, "left_out", "not of the set, or without a side") if row is None else row)
            for number, row in external_rows(pool)
        )
        contents = _contents(rows, source=wanted.place)
        if not contents.prompts:
            raise PromptFileError(_nothing_message(wanted.place, contents))
    except InputError as error:
        if pool.required:
            raise InputError(f"{error} `required: false` goes on without the set.") from error
        say(f"evaluation set {pool.set} is skipped: {error}")
        return replace(nothing, skipped=str(error))
    return replace(nothing, prompts=contents.prompts, bad=contents.bad)


def _contents(rows: Iterable[tuple[int, Any]], *, source: str) -> PoolContents:
    first_seen: dict[str, int] = {}
    prompts: list[Prompt] = []
    bad: list[BadLine] = []
    for number, row in rows:
        prompt = row if isinstance(row, BadLine) else _prompt(number, row, source)
        if isinstance(prompt, BadLine):
            bad.append(prompt)
            continue
        first = first_seen.setdefault(normalised(prompt), number)
        if first != number:
            bad.append(BadLine(number, "duplicate", f"the same prompt as line {first}; remove one of them"))
            continue
        prompts.append(prompt)
    return PoolContents(prompts=tuple(prompts), bad=tuple(bad), source=source)


def _prompt(number: int, row: Any, source: str) -> Prompt | BadLine:
    if not isinstance(row, dict) or ("prompt" in row) == ("messages" in row):
        return BadLine(number, "not_a_conversation", 'wanted {"prompt": "..."} or {"messages": [...]}, one of the two')
    asked = row["prompt"] if "prompt" in row else row["messages"]
    turns = [{"role": "user", "content": asked}] if isinstance(asked, str) else asked
    try:
        messages = tuple(Message.model_validate(turn) for turn in turns) if isinstance(turns, list | tuple) else ()
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "a message"
        return BadLine(number, "not_a_conversation", f"{where}: {error.errors()[0]['msg']}")
    if not messages or messages[-1].role != "user":
        return BadLine(number, "not_a_conversation", "messages must be a list that ends with a user turn")
    if any(message.role == "system" for message in messages[1:]):
        return BadLine(number, "not_a_conversation", "a system turn can only come first")
    if not all(message.content.strip() for message in messages):
        return BadLine(number, "empty_prompt", "a turn without text")
    if any("\ud800" <= sign <= "\udfff" for message in messages for sign in message.content):
        # JSON can spell half of a surrogate pair, which no UTF-8 file can hold again.
        return BadLine(number, "not_utf8", "an escape such as \\ud800 that is half of a character")
    return _tagged(number, messages, row.get("tags") or {}, source)


def _tagged(number: int, messages: tuple[Message, ...], tags: Any, source: str) -> Prompt | BadLine:
    if not isinstance(tags, dict) or not all(isinstance(value, str) for value in tags.values()):
        return BadLine(number, "bad_tags", '"tags" must map names to text')
    sides = [side.value for side in Side]
    if tags.get("side", Side.TASK.value) not in sides:
        return BadLine(number, "bad_tags", f"side {tags['side']!r} is none of {', '.join(sides)}")
    return Prompt.build(messages, source=source, tags=tags)


# ------------------------------------------------------------------------------------------------------------- messages


def _bad_lines_message(name: str, contents: PoolContents) -> str:
    return "\n".join(
        [
            f"{name}: {len(contents.bad)} of {contents.num_lines} prompts cannot be used:",
            *_listed(contents.bad),
            "Mend or remove these lines, or go on without them: --skip-bad-prompts, or `skip_bad: true` under `prompts`.",
        ]
    )


def _nothing_message(name: str, contents: PoolContents) -> str:
    why = f"all {len(contents.bad)} lines are bad:\n" + "\n".join(_listed(contents.bad)) if contents.bad else "it is empty"
    return f"{name} has no usable prompt; {why}"


def _listed(bad: tuple[BadLine, ...]) -> list[str]:
    lines = [f"  line {line.number}: {line.reason.replace('_', ' ')}: {line.detail}" for line in bad[:_MAX_LISTED]]
    return [*lines, f"  … and {len(bad) - _MAX_LISTED} more"] if len(bad) > _MAX_LISTED else lines
