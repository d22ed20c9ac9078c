"""Configuration of each room. Units are in the names; unknown keys are refused; every default is recorded with the run.

Variants are unions tagged by `kind`, which has no default so that a form or an API call must name it. What does not change what a
stage makes (how it is served, how fast, what makes it refuse) is listed in `not_in_key` and leaves the stage's key alone.
Defaults are those of a 7-9B model on one GPU (design §6); the tiny world of the demo has its own in deploy/configs/demo.yaml.
"""

from dpo_loop.config.base import Fraction, ModuleFunction, Settings
from dpo_loop.config.capability import (
    CapabilityConfig,
    CapabilityTask,
    ExactMatchTask,
    InspectTask,
    LmEvalTask,
    LocalTask,
    MultipleChoiceTask,
    PerplexityTask,
    ProducedTask,
)
from dpo_loop.config.evaluation import (
    HIGHER_IS_BETTER,
    METRIC_NAMES,
    WIN_RATES,
    AnswerConfig,
    CheckConfig,
    GateConfig,
    Metric,
    VetoConfig,
)
from dpo_loop.config.generation import EngineConfig, GenerationConfig, PairingConfig
from dpo_loop.config.prompts import (
    BuiltinPool,
    ExternalColumns,
    ExternalPool,
    HubPool,
    JsonlPool,
    Pool,
    PromptsConfig,
    SideColumn,
    TinyWorldConfig,
    TrainingPool,
)
from dpo_loop.config.training import LoraShape, ModelStart, OptimizerConfig, SftConfig, SftStart, SigmoidLoss, Start, TrainingConfig

__all__ = [
    "HIGHER_IS_BETTER",
    "METRIC_NAMES",
    "WIN_RATES",
    "AnswerConfig",
    "BuiltinPool",
    "CapabilityConfig",
    "CapabilityTask",
    "CheckConfig",
    "EngineConfig",
    "ExactMatchTask",
    "ExternalColumns",
    "ExternalPool",
    "Fraction",
    "GateConfig",
    "GenerationConfig",
    "HubPool",
    "InspectTask",
    "JsonlPool",
    "LmEvalTask",
    "LocalTask",
    "LoraShape",
    "Metric",
    "ModelStart",
    "ModuleFunction",
    "MultipleChoiceTask",
    "OptimizerConfig",
    "PairingConfig",
    "PerplexityTask",
    "Pool",
    "ProducedTask",
    "PromptsConfig",
    "Settings",
    "SftConfig",
    "SftStart",
    "SideColumn",
    "SigmoidLoss",
    "Start",
    "TinyWorldConfig",
    "TrainingConfig",
    "TrainingPool",
    "VetoConfig",
]
