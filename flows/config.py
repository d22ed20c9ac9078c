"""RunConfig: one YAML file, the parameters of the flows, and what is recorded with a run, in one schema."""

from __future__ import annotations

from pydantic import Field

from dpo_loop.config import (
    AnswerConfig,
    GateConfig,
    GenerationConfig,
    PairingConfig,
    PromptsConfig,
    Start,
    TinyWorldConfig,
    TrainingConfig,
)
from dpo_loop.types import Record
from judges.config import GradingConfig, Judge


class RunConfig(Record):
    """Everything about a run. A path that begins with `world:` is a file of the run's own tiny world."""

    run_id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$", max_length=60)
    run_dir: str
    rounds: int = Field(3, ge=1)
    seed: int = 0
    world: TinyWorldConfig | None = None
    start: Start
    prompts: PromptsConfig
    generation: GenerationConfig
    judge: Judge
    pairing: PairingConfig = PairingConfig()
    training: TrainingConfig
    answering: AnswerConfig = AnswerConfig()
    grading: GradingConfig
    gate: GateConfig
    max_consecutive_failures: int = Field(2, ge=1)
    """Rounds in a row without promotion after which the loop stops."""
    stage_retries: int = Field(2, ge=0)
    stage_timeout_s: float | None = Field(None, gt=0)
    review_timeout_s: float = Field(0.0, ge=0)
    """How long a round that needs a person is waited for before the loop goes on with the previous policy."""
