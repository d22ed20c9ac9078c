"""Where the files of a config are: made absolute, since stages may run in another directory, and left out of what is compared."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_loop.config import CapabilityTask, JsonlPool, Pool, SftStart, Start, TrainingConfig
from judges.config import (
    BySideGrader,
    Judge,
    JudgeGrader,
    PanelJudge,
    RemoteJudge,
    RewardModelJudge,
    SafetyGrader,
    Single,
    VllmRunBatchJudge,
)

if TYPE_CHECKING:
    from flows.config import RunConfig

WORLD_PREFIX = "world:"
"""Of a file that the run's own tiny world makes."""


def resolve_paths(config: RunConfig) -> RunConfig:
    """Relative paths made absolute, since stages may run in another directory; hub ids and `world:` files stay as they are."""
    start = config.start
    changes: dict[str, Any] = {"model": _absolute_model(start.model)}
    if isinstance(start, SftStart):
        changes["demonstrations"] = _absolute(start.demonstrations)
    elif start.adapter is not None:
        changes["adapter"] = _absolute(start.adapter)
    prompts = config.prompts.model_copy(
        update={
            "pool": _absolute_pool(config.prompts.pool),
            "eval_sets": tuple(_absolute_pool(pool) for pool in config.prompts.eval_sets),
        }
    )
    return config.model_copy(
        update={
            "run_dir": _absolute(config.run_dir),
            "start": start.model_copy(update=changes),
            "prompts": prompts,
            "judge": _absolute_judge(config.judge),
            "training": _absolute_training(config.training),
            "capability": config.capability.model_copy(
                update={"tasks": tuple(_absolute_task(task) for task in config.capability.tasks)}
            ),
            "grading": config.grading.model_copy(
                update={"win_judge": _absolute_judge(config.grading.win_judge), "safety": _absolute_grader(config.grading.safety)}
            ),
            "budget": config.budget.model_copy(update={"prices": config.budget.prices and _absolute(config.budget.prices)}),
        }
    )


def is_hub_id(model: str) -> bool:
    """`name` or `owner/name`, and no directory of that name here."""
    return bool(re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model)) and not Path(model).is_dir()


def _absolute_model(model: str) -> str:
    return model if is_hub_id(model) else _absolute(model)


def _absolute_pool(pool: Pool) -> Pool:
    return pool.model_copy(update={"path": _absolute(pool.path)}) if isinstance(pool, JsonlPool) else pool


def _absolute_training(training: TrainingConfig) -> TrainingConfig:
    files = {"feedback": training.feedback, "accelerate_config": training.accelerate_config}
    return training.model_copy(update={name: path and _absolute(path) for name, path in files.items()})


def _absolute_task(task: CapabilityTask) -> CapabilityTask:
    return task if task.path is None else task.model_copy(update={"path": _absolute(task.path)})


def _absolute_judge(judge: Judge | None) -> Judge | None:
    if isinstance(judge, PanelJudge):
        return judge.model_copy(update={"judges": tuple(_absolute_single(member) for member in judge.judges)})
    return judge if judge is None else _absolute_single(judge)


def _absolute_grader(grader: SafetyGrader) -> SafetyGrader:
    match grader:
        case JudgeGrader():
            return grader.model_copy(update={"judge": _absolute_single(grader.judge)})
        case BySideGrader():
            sides = {"harmful": _absolute_grader(grader.harmful), "benign": _absolute_grader(grader.benign)}
            return grader.model_copy(update=sides)
    return grader


def _absolute_single(judge: Single) -> Single:
    match judge:
        case RemoteJudge():
            changes = {"rubric": _absolute(judge.rubric)} if judge.rubric.endswith(".md") else {}
            if isinstance(judge, VllmRunBatchJudge):
                changes["weights"] = _absolute_model(judge.weights)
            return judge.model_copy(update=changes)
        case RewardModelJudge():
            return judge.model_copy(update={"model": _absolute_model(judge.model)})
    return judge


def _absolute(path: str) -> str:
    return path if path.startswith(WORLD_PREFIX) else str(Path(path).expanduser().absolute())


def placeless_start(start: Start) -> Start:
    """The start without locations: what is at them reaches a key as content, so a run and its model can move."""
    names: dict[str, Any] = {} if is_hub_id(start.model) else {"model": Path(start.model).name}
    if isinstance(start, SftStart):
        names["demonstrations"] = Path(start.demonstrations).name
    elif start.adapter is not None:
        names["adapter"] = Path(start.adapter).name
    return start.model_copy(update=names)
