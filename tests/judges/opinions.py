"""Judges given as functions, and what can be seen of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dpo_loop.types import Graded, Outcome
from judges.backend import BackendSpec, JudgeRequest, Reply

Opinion = Callable[[str, str], Outcome]
"""opinion(left, right): what a judge thinks of two texts in the order shown."""


class Opinionated:
    """A Backend. quality: its grade of one text alone."""

    def __init__(
        self,
        opinion: Opinion,
        *,
        name: str = "opinion",
        family: str = "",
        is_instant: bool = True,
        concurrency: int = 1,
        quality: Callable[[str], Outcome] | None = None,
    ) -> None:
        self.opinion = opinion
        self.quality = quality or (lambda text: Graded(quality=0.5))
        self.asked: list[tuple[str, str | None]] = []
        self._spec = BackendSpec(name, {"kind": "opinion", "name": name}, concurrency, is_instant, family)

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def ask(self, request: JudgeRequest) -> Reply:
        self.asked.append((request.left, request.right))
        await asyncio.sleep(0)
        right = request.right
        return Reply(outcome=self.quality(request.left) if right is None else self.opinion(request.left, right), cost_usd=0.0)

    async def aclose(self) -> None:
        pass
