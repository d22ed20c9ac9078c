"""Who owns a prompt: demonstrations, the pool, or the safety evaluation. Ownership is a hash of what is asked, so no prompt, no other
wording of it and no twin of it can be in two of them, however many are drawn."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Protocol, TypeVar

from dpo_loop.errors import InputError
from dpo_loop.types import content_id


class Part(StrEnum):
    DEMONSTRATIONS = "demonstrations"
    POOL = "pool"
    SAFETY_EVALUATION = "safety_evaluation"


# Tenths of the key space; sized by how many each part draws.
_OWNERS = (Part.DEMONSTRATIONS,) * 5 + (Part.POOL,) * 3 + (Part.SAFETY_EVALUATION,) * 2
_MAX_MISSES = 10_000


class Asked(Protocol):
    @property
    def key(self) -> str: ...


Drawn = TypeVar("Drawn", bound=Asked)


def owner(key: str, *, seed: int) -> Part:
    return _OWNERS[int(content_id("part", seed, key), 16) % len(_OWNERS)]


def draw_unique(draw: Callable[[], Drawn], num: int, *, part: Part, seed: int) -> list[Drawn]:
    """`num` draws that belong to `part`, no two with the same key. Raises InputError when the space is used up."""
    taken: dict[str, Drawn] = {}
    misses = 0
    while len(taken) < num:
        drawn = draw()
        if owner(drawn.key, seed=seed) is part and drawn.key not in taken:
            taken[drawn.key] = drawn
            misses = 0
            continue
        misses += 1
        if misses > _MAX_MISSES:
            raise InputError(
                f"the tiny world has only {len(taken)} distinct prompts for {part}, not the {num} asked for; lower the numbers under `world`"
            )
    return list(taken.values())
