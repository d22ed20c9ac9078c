"""What the formats of guards have in common.

A guard reads plain text between marks, so an answer could write the marks itself; `inert` takes those away that open or close a turn or a
part of a format. It cannot take away words: an answer that imitates a guard's *reply* is left to the guard, and to the canary that tests it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dpo_loop.types import Outcome, Prompt
from judges.backend import JudgeRequest

_MARK = re.compile(r"<(?=\||/?(?:s|bos|eos|start_of_turn|end_of_turn)>|(?:BEGIN|END) )|\[(?=/?INST\])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Said:
    """What a guard generated. first: log-probabilities of the likeliest first tokens, where they were asked for."""

    text: str
    finish_reason: str
    first: Mapping[str, float]


class Form(Protocol):
    """One format. sees: everything of a request that is not the material; part of every key."""

    sees: str

    def body(self, request: JudgeRequest) -> dict[str, Any]:
        """`messages` or `prompt`, and what of the sampling the format itself decides."""
        ...

    def outcome(self, said: Sequence[Said], request: JudgeRequest) -> Outcome:
        """said: at least one. Classified, or undecided where the reply does not fit the format."""
        ...


def inert(text: str) -> str:
    """The text with a space in every mark of a template, and without half surrogate pairs, which cannot be sent."""
    return _MARK.sub(lambda mark: f"{mark[0]} ", re.sub(r"[\ud800-\udfff]", "\ufffd", text))


def conversation_of(prompt: Prompt) -> str:
    """A single question as it is; several turns one after the other, each with its role."""
    if len(prompt.messages) == 1:
        return inert(prompt.text)
    return "\n\n".join(f"{message.role}: {inert(message.content)}" for message in prompt.messages)
