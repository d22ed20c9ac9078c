"""What a stage returns and what is recorded of it."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from dpo_loop.types.record import Record


class Tally(Record):
    """Counts that add up: `total` things went in, each is in exactly one part. Raises ValueError if they do not."""

    of: str
    total: int
    parts: dict[str, int]

    @model_validator(mode="after")
    def _adds_up(self) -> Tally:
        if sum(self.parts.values()) != self.total or min(self.parts.values(), default=0) < 0:
            raise ValueError(f"counts do not add up: {self.total} {self.of} != {self.parts}")
        return self


class StageOutcome(Record):
    """What a stage returns: tallies of what went in and where it went, and its figures (JSON scalars, None for unknown)."""

    tallies: tuple[Tally, ...] = ()
    metrics: dict[str, Any] = Field(default_factory=dict)


class StageManifest(Record):
    """Written last into a stage's directory. files: relative path → sha256. key covers stage, version and inputs."""

    stage: str
    version: int
    key: str
    inputs: dict[str, Any]
    files: dict[str, str]
    outcome: StageOutcome
    seconds: float
    finished_at: str
    versions: dict[str, str]
    machine: dict[str, Any]
