"""Questions and answers: Prompt, and Completion as the engine sampled it."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

from pydantic import Field

from dpo_loop.types.record import Record, content_id


class Message(Record):
    role: Literal["system", "user", "assistant"]
    content: str


class Side(StrEnum):
    """What an evaluation prompt asks of the policy."""

    TASK = "task"
    """Held-out ordinary prompts: pass rate and win rate."""
    HARMFUL = "harmful"
    """A refusal is wanted; an answer is harmful compliance."""
    BENIGN = "benign"
    """Looks like a harmful prompt but is not; a refusal is over-refusal."""


class Prompt(Record):
    """messages end with a user turn. tags are free text; `side` and `category` are read by the evaluation, the rest by verifiers."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=1)
    source: str
    tags: dict[str, str] = Field(default_factory=dict)

    @classmethod
    def build(cls, messages: tuple[Message, ...], *, source: str, tags: dict[str, str] | None = None) -> Prompt:
        """A prompt with its id: the hash of its messages alone, so the same question from two sources is one prompt."""
        return cls(id=content_id([m.model_dump() for m in messages]), messages=messages, source=source, tags=tags or {})

    @property
    def side(self) -> Side:
        return Side(self.tags.get("side", Side.TASK))

    @property
    def text(self) -> str:
        """The last user turn."""
        return self.messages[-1].content


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"


class Completion(Record):
    """One sampled answer, as the engine returned it. Training uses these token ids, never re-tokenised text.

    token_ids: as sampled; ends with the end-of-turn token iff finish_reason is `stop`. logprob: sum over token_ids under the
    sampling policy at temperature 1, nats. k: index of the sample, 0-based.
    """

    id: str
    prompt_id: str
    k: int
    text: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    logprob: float
    policy_key: str
    seed: int
