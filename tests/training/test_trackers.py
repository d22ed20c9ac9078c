"""Figures that are sent to trackers: what TensorBoard shows, and what is said where a tracker is not installed."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker

from dpo_loop.artifacts import read_manifest, verify
from dpo_loop.errors import InputError
from dpo_loop.exchange import METRICS
from dpo_loop.training.loop.trackers import FOLDER, finish, send
from dpo_loop.training.models import build_accelerator
from dpo_loop.training.prerequisites import tracker_problems
from dpo_loop.types import PolicyRef
from tests.training.world import stage_dir, train, training_config

needs_tensorboard = pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_gets_every_figure_of_every_step_beside_the_stage(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(trackers=("tensorboard",)))
    folder = stage_dir(tmp_path).parent / FOLDER
    events = EventAccumulator(str(folder / "dpo-loop"))
    events.Reload()
    for row in map(json.loads, (stage_dir(tmp_path) / METRICS).read_text().splitlines()):
        for name, value in row.items():
            if name != "step":
                (found,) = [each.value for each in events.Scalars(name) if each.step == row["step"]]
                assert found == pytest.approx(value, rel=1e-5), (name, row["step"])
    assert not [name for name in manifest.files if FOLDER in name]  # no part of what is published and hashed
    verify(stage_dir(tmp_path), read_manifest(stage_dir(tmp_path)))
    assert "training.trackers" not in "".join(tracker_problems(["tensorboard"]))


@needs_tensorboard
def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    path = stage_dir(tmp_path).parent / FOLDER
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(InputError, match=r"training\.trackers: .*trackers is a file.*move it away"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(trackers=("tensorboard",)))
    assert path.read_text() == "mine"


@needs_tensorboard
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_a_tracker_that_does_not_start_is_said_once_and_left_out(
    tmp_path: Path, base: PolicyRef, pairs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stage_dir(tmp_path).parent / FOLDER
    folder.mkdir(parents=True)
    (folder / "dpo-loop").write_text("a file where tensorboard wants its own folder")
    manifest = train(tmp_path, pairs=pairs, policy=base, config=training_config(trackers=("tensorboard",)))
    assert manifest.outcome.metrics["steps"] == 6
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "tracker" in line]
    assert line.startswith("train: the tracker tensorboard did not start (")
    assert line.endswith("training goes on without it")


class Stubborn(GeneralTracker):
    """Takes two steps, and neither a third nor its end."""

    name, requires_logging_directory, tracker = "stubborn", False, None

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        if len(self.steps) == 2:
            raise OSError(28, "No space left on device")
        self.steps.append(step or 0)

    def finish(self) -> None:
        raise RuntimeError


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    accelerator = build_accelerator("float32")
    fails, works = Stubborn(), Stubborn()
    accelerator.trackers = [fails, works]
    fails.steps = [-1]
    for step in (1, 2):
        send(accelerator, {"loss": 0.5}, step=step)
    assert (fails.steps, works.steps, accelerator.trackers) == ([-1, 1], [1, 2], [works])
    finish(accelerator)
    assert accelerator.trackers == []
    assert capsys.readouterr().out.splitlines() == [
        "train: the tracker stubborn did not take step 2 (OSError: [Errno 28] No space left on device); training goes on without it",
        "train: the tracker stubborn did not end (RuntimeError: no message); training goes on without it",
    ]


@pytest.mark.skipif(find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_tracker_that_is_not_installed_is_named_with_the_way_to_install_it(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    (problem,) = tracker_problems(["mlflow"])
    assert problem == "training.trackers: mlflow is not installed; `pip install mlflow`, or take it off the list"
    with pytest.raises(InputError, match="pip install mlflow"):
        train(tmp_path, pairs=pairs, policy=base, config=training_config(trackers=("mlflow",)))
    assert not (stage_dir(tmp_path).parent / FOLDER).exists()


def test_nobody_is_sent_anything_unless_it_is_asked_for(tmp_path: Path, base: PolicyRef, pairs: Path) -> None:
    train(tmp_path, pairs=pairs, policy=base, config=training_config())
    assert not (stage_dir(tmp_path).parent / FOLDER).exists()
    assert tracker_problems([]) == []
