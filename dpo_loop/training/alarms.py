"""What the figures of training say when something is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from dpo_loop.config import AlarmsConfig
from dpo_loop.types import Record


class Alarm(Record):
    """step: the optimizer step, 1-based, at which `value` went past `limit`."""

    name: str
    level: Literal["warn", "stop"]
    step: int
    value: float
    limit: float
    message: str


def alarms_at(rows: Sequence[Mapping[str, Any]], config: AlarmsConfig, *, max_grad_norm: float) -> list[Alarm]:
    """Alarms of the newest row of metrics.jsonl, given the rows so far; the caller raises each name and level once."""
    raise NotImplementedError
