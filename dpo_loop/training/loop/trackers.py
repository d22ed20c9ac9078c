"""Figures of training sent to TensorBoard, Weights & Biases or MLflow too, through accelerate, where the config asks for it.

Files land in `<round>/trackers/`, beside the published stage: they hold times and host names, so they are no part of what a stage
publishes and hashes, and they outlive its scratch. Show a whole run with `tensorboard --logdir <run>/rounds`.

The stage's own metrics.jsonl is what counts, so a tracker that fails is said once and left out; training goes on without it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import filter_trackers

from dpo_loop.config import TrainingConfig
from dpo_loop.errors import InputError
from dpo_loop.progress import say
from dpo_loop.training.prerequisites import tracker_problems

FOLDER, PROJECT = "trackers", "dpo-loop"


@contextmanager
def tracking(accelerator: Any, config: TrainingConfig, *, out: Path) -> Iterator[None]:
    """Inside, `send` sends figures to config.trackers; afterwards the process group is gone too. out: of the stage.

    Weights & Biases writes offline files unless WANDB_MODE says otherwise; MLflow writes to a database in the folder unless
    MLFLOW_TRACKING_URI names another. Raises InputError if a package is not installed, or if a file is where the folder should be.
    """
    if not config.trackers:
        yield
        return
    if problems := tracker_problems(config.trackers):
        raise InputError("; ".join(problems))
    here = out.resolve().parent
    folder, name = here / FOLDER, f"{here.parent.parent.name}-{here.name}"
    try:
        folder.mkdir(exist_ok=True)
    except FileExistsError as error:
        raise InputError(
            f"training.trackers: {folder} is a file, and the trackers' folder should be there; move it away"
        ) from error
    with _defaults(WANDB_MODE="offline", MLFLOW_TRACKING_URI=f"sqlite:///{folder}/mlflow.db"):
        _start(accelerator, config, folder=folder, name=name)
        try:
            yield
        finally:
            finish(accelerator)


def send(accelerator: Any, figures: Mapping[str, float], *, step: int) -> None:
    """The figures of optimizer step `step`, 1-based, to the trackers that work."""
    _each(accelerator, f"take step {step}", lambda tracker: tracker.log(dict(figures), step=step))


def finish(accelerator: Any) -> None:
    """End what trackers there are, and the process group."""
    _each(accelerator, "end", lambda tracker: tracker.finish())
    accelerator.trackers = []
    accelerator.end_training()


def _start(accelerator: Any, config: TrainingConfig, *, folder: Path, name: str) -> None:
    accelerator.project_configuration.set_directories(str(folder))
    started = []
    for kind in filter_trackers(list(config.trackers), str(folder)):
        accelerator.log_with, accelerator.trackers = [kind], []
        try:
            accelerator.init_trackers(
                PROJECT,
                config=_flat(config),
                init_kwargs={"wandb": {"dir": str(folder), "name": name}, "mlflow": {"run_name": name}},
            )
        except Exception as error:
            _leave_out(str(kind), "start", error)
        else:
            started += accelerator.trackers
    accelerator.trackers = started


def _each(accelerator: Any, what: str, call: Callable[[Any], None]) -> None:
    for tracker in list(accelerator.trackers):
        try:
            call(tracker)
        except Exception as error:
            accelerator.trackers.remove(tracker)
            _leave_out(tracker.name, what, error)


def _leave_out(name: str, what: str, error: Exception) -> None:
    said = (str(error).strip() or "no message").splitlines()[0]
    say(f"train: the tracker {name} did not {what} ({type(error).__name__}: {said}); training goes on without it")


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
