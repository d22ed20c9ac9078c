"""Who gets which prompt: a hash of the question and the run's seed decides, and nothing else.

So a prompt stays where it is when lines are added to the pool, the same question typed in two ways is in one place only, and
the evaluation share is never trained on, not even the part of it beyond `max_eval`. Of what evaluates, a share may be kept in reserve: prompts
of one cluster are then on the same side.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dpo_loop.config import PromptsConfig
from dpo_loop.errors import InputError
from dpo_loop.prompts.pool import normalised
from dpo_loop.types import Prompt, content_id

_FULL = float(2**64)


def is_held_out(prompt: Prompt, *, config: PromptsConfig, seed: int) -> bool:
    """Whether the prompt is in the evaluation share of the pool."""
    return _hash("evaluation", seed, normalised(prompt)) / _FULL < config.eval_fraction


def is_reserved(prompt: Prompt, *, config: PromptsConfig, seed: int) -> bool:
    """Whether an evaluation prompt waits for a second look."""
    together = prompt.tags.get("cluster_id") or normalised(prompt)
    return _hash("reserve", seed, together) / _FULL < config.eval_reserve


def bucket_of(prompt: Prompt, *, config: PromptsConfig, seed: int) -> int:
    """0 … num_buckets - 1"""
    return _hash("bucket", seed, normalised(prompt)) % config.num_buckets


def shuffled(prompts: Iterable[Prompt], *, seed: int) -> list[Prompt]:
    """An order that depends on the prompts and the seed, not on the order of the file."""
    return sorted(prompts, key=lambda prompt: (_hash("order", seed, normalised(prompt)), prompt.id))


@dataclass(frozen=True, slots=True)
class Turn:
    """bucket: what the round takes. cycle: how often the buckets were used up before, 0 at first."""

    bucket: int
    cycle: int


def turn_of(round_number: int, *, config: PromptsConfig) -> Turn:
    """Rounds count from 1. Raises InputError when the buckets are used up and `reuse` is `fresh`."""
    cycle, bucket = divmod(round_number - 1, config.num_buckets)
    if cycle and config.reuse == "fresh":
        raise InputError(
            f"round {round_number} has no fresh prompts: the pool is cut into {config.num_buckets} buckets and each has had its round. "
            "Ways out: raise prompts.num_buckets (in a new run), or set prompts.reuse to `cycle` to use prompts again."
        )
    return Turn(bucket=bucket, cycle=cycle)


def _hash(purpose: str, seed: int, text: str) -> int:
    """64 bits; independent for each purpose."""
    return int(content_id(purpose, seed, text), 16)
