"""vLLM's progress bar as plain lines of a stage."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from dpo_loop.progress import say


class ProgressLines(tqdm):  # type: ignore[misc]
    """At most one line in five seconds; the stage itself says when the shard is finished."""

    monitor_interval = 0  # no thread that watches the bar

    def __init__(self, *args: Any, stage: str, **kwargs: Any) -> None:
        self._stage = stage
        super().__init__(*args, **{**kwargs, "mininterval": 5.0, "delay": 5.0})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:  # noqa: ARG002 - tqdm's signature
        if self.n < self.total:
            say(f"{self._stage}: {self.n}/{self.total} completions of this shard, {self.postfix}")

    def close(self) -> None:
        self.disable = True
