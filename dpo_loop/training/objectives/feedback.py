"""Thumbs for single answers, from a file that people write, as examples of KTO."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pydantic import StrictBool, ValidationError

from dpo_loop.errors import InputError
from dpo_loop.training.objectives.kto import Example
from dpo_loop.training.objectives.sft import Demonstration, lines_of, render
from dpo_loop.types import Message, Record


class Feedback(Record):
    """A thumb for the last assistant turn of a conversation."""

    messages: tuple[Message, ...]
    thumbs_up: StrictBool


def read_feedback(path: Path) -> list[Feedback]:
    """JSONL of {"messages": [...], "thumbs_up": true or false}; other keys are ignored.

    Raises InputError with the number and the reason of the first line that is not so, or for a file without any.
    """
    found = []
    for number, line in enumerate(lines_of(path), start=1):
        try:
            row = json.loads(line)
            feedback = Feedback.model_validate({name: row[name] for name in ("messages", "thumbs_up")})
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}:{number} is not feedback: {_reason(error)}. "
                'Expected {"messages": [{"role": ..., "content": ...}, ...], "thumbs_up": true or false}'
            ) from error
        last = feedback.messages[-1] if len(feedback.messages) > 1 else None
        if last is None or last.role != "assistant" or not last.content.strip():
            raise InputError(f"{path}:{number} does not end with an assistant turn that says something after a user turn")
        found.append(feedback)
    if not found:
        raise InputError(f"{path} holds no feedback")
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def tokenize_feedback(feedback: Sequence[Feedback], model_dir: str, *, max_length: int, where: Path) -> list[Example | str]:
    """Each thumb as an example whose completion is the last assistant turn, or why it cannot be trained on, as `render` says.

    where: the file that holds one thumb a line. Raises InputError as `render` does, or if of either thumb there is some and none can be
    trained on.
    """
    rows = [Demonstration(messages=each.messages) for each in feedback]
    rendered = render(rows, model_dir, max_length=max_length, train_on="last_turn", where=where)
    found = [
        each if isinstance(each, str) else Example(each.sequence, given.thumbs_up)
        for given, each in zip(feedback, rendered, strict=True)
    ]
    for thumbs_up in (True, False):
        of_thumb = [each for given, each in zip(feedback, found, strict=True) if given.thumbs_up is thumbs_up]
        reasons = Counter(each for each in of_thumb if isinstance(each, str))
        if reasons and reasons.total() == len(of_thumb):
            raise InputError(
                f"{where}: none of its {len(of_thumb)} thumbs {'up' if thumbs_up else 'down'} can be trained on: {dict(reasons)}; see "
                "training.max_length and the chat template"
            )
    return found
