"""Figures that are sent to trackers: what TensorBoard shows, and what is said where a tracker is not installed."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from dpo_loop.artifacts import read_manifest, verify
from dpo_loop.errors import InputError
from dpo_loop.exchange import METRICS
from dpo_loop.training.loop.trackers import FOLDER
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
