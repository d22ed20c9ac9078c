"""Figures of training sent to TensorBoard, Weights & Biases or MLflow too, through accelerate, where the config asks for it.

Files land in `<round>/trackers/`, beside the published stage: they hold times and host names, so they are no part of what a stage
publishes and hashes, and they outlive its scratch. Show a whole run with `tensorboard --logdir <run>/rounds`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import filter_trackers

from dpo_loop.config import TrainingConfig
from dpo_loop.errors import InputError
from dpo_loop.training.prerequisites import tracker_problems

FOLDER, PROJECT = "trackers", "dpo-loop"


@contextmanager
def tracking(accelerator: Any, config: TrainingConfig, *, out: Path) -> Iterator[None]:
    """Inside, `accelerator.log` sends figures to config.trackers; afterwards the process group is gone too. out: of the stage.

    Weights & Biases writes offline files unless WANDB_MODE says otherwise; MLflow writes to a database in the folder unless
    MLFLOW_TRACKING_URI names another. Raises InputError if a package is not installed.
    """
    if not config.trackers:
        yield
        return
    if problems := tracker_problems(config.trackers):
        raise InputError("; ".join(problems))
    here = out.resolve().parent
    folder, name = here / FOLDER, f"{here.parent.parent.name}-{here.name}"
    folder.mkdir(exist_ok=True)
    with _defaults(WANDB_MODE="offline", MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"):
        accelerator.project_configuration.set_directories(str(folder))
        accelerator.log_with = filter_trackers(list(config.trackers), str(folder))
        accelerator.init_trackers(
            PROJECT,
            config=_flat(config),
            init_kwargs={"wandb": {"dir": str(folder), "name": name}, "mlflow": {"run_name": name}},
        )
        try:
            yield
        finally:
            accelerator.end_training()


@contextmanager
def _defaults(**variables: str) -> Iterator[None]:
    added = [name for name in variables if name not in os.environ]
    os.environ.update({name: variables[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _flat(config: TrainingConfig) -> dict[str, str | int | float | bool]:
    """`optimizer.lr` and so on, since trackers keep scalars only."""
    found: dict[str, str | int | float | bool] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                walk(f"{prefix}.{name}" if prefix else name, item)
        else:
            found[prefix] = value if isinstance(value, str | int | float | bool) else str(value)

    walk("", config.model_dump(mode="json"))
    return found
