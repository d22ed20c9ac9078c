"""Progress of a training as lines: where it is, how fast, how long it still takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dpo_loop.progress import say

SAY_EVERY_S = 2.0


class StepLines:
    """opening: stage and label, which open every line. first: steps that were done before."""

    def __init__(self, opening: str, *, num_steps: int, first: int) -> None:
        self.opening, self.num_steps, self.first = opening, num_steps, first
        self.started = self.said = time.monotonic()

    def show(self, row: Mapping[str, Any], *, is_last: bool) -> None:
        """One line every SAY_EVERY_S, and one for the last step. row: the metrics of the step just done."""
        now, step = time.monotonic(), row["step"]
        if now - self.said < SAY_EVERY_S and not is_last:
            return
        self.said = now
        left_s = 0.0 if is_last else (now - self.started) / (step - self.first) * (self.num_steps - step)
        say(
            f"{self.opening} step {step}/{self.num_steps}, loss {row['loss']:.4f}, {row['tokens_per_s']:.0f} tok/s, {left_s:.0f} s left"
        )
