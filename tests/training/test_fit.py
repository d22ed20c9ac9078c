"""What the loop does at the edges: seeds, short trainings, early stops, settings of accelerate in the environment."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from dpo_loop.config import (
    AlarmLimits,
    AlarmsConfig,
    HeldOutConfig,
    OptimizerConfig,
    SftConfig,
    SigmoidLoss,
    SppoHardLoss,
    TrainingConfig,
)
from dpo_loop.exchange import ALARMS, METRICS
from dpo_loop.reporting.health import StageFigures
from dpo_loop.reporting.model_card import TrainedRound, render_card
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.training.loop.fit import seed_of
from dpo_loop.types import PolicyRef, StageManifest
from tests.reporting.test_model_card import facts
from tests.reporting.test_page import Page
from tests.training.test_resume import STOPS_EARLY, Breaks, attempt, without_clock
from tests.training.world import make_pairs, stage_dir, train, training_config, write_pairs

NEVER = AlarmLimits(warn=None, stop=None)
QUIET = {name: NEVER for name, field in AlarmsConfig.model_fields.items() if field.annotation is AlarmLimits}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- gradients


def test_accelerates_accumulation_in_the_environment_changes_no_gradient(
    tmp_path: Path, base: PolicyRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It divides the loss by it: the loop divides by the size of the step itself."""
    config = training_config(epochs=1, micro_batch_tokens=50)
    weights, fitted, _ = attempt(base, tmp_path / "plain", config)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    others, same, _ = attempt(base, tmp_path / "scaled", config)
    assert without_clock(same.rows) == without_clock(fitted.rows)
    assert all(torch.equal(weights[name], tensor) for name, tensor in others.items())


# ----------------------------------------------------------------------------------------------------------------- seeds


def test_small_seeds_draw_what_they_drew_before_and_large_ones_what_torch_takes() -> None:
    assert seed_of(0, 0, 0) == 0
    assert seed_of(3, 7, 2) == 3 * 1_000_003 + 7 + 2 * 15_485_863
    drawn = {seed_of(seed, step, 0) for seed in (2**63 - 1, 2**62, 10**14) for step in (0, 1)}
    assert len(drawn) == 6
    for seed in drawn:
        torch.manual_seed(seed)


def test_the_largest_seed_trains(tmp_path: Path, base: PolicyRef) -> None:
    pairs = write_pairs(tmp_path / "pair", make_pairs(8))
    train(tmp_path, pairs=pairs, policy=base, config=training_config(seed=2**63 - 1))
    assert len(rows(stage_dir(tmp_path) / METRICS)) == 1


@pytest.mark.parametrize("seed", [2**63, -1])
def test_a_seed_that_torch_does_not_take_is_refused_by_the_config(seed: int) -> None:
    with pytest.raises(ValidationError, match="seed"):
        training_config(seed=seed)
    with pytest.raises(ValidationError, match="seed"):
        SftConfig(seed=seed)


# ------------------------------------------------------------------------------------------------------------ early stop


@pytest.fixture(scope="module")
def stopped(base: PolicyRef, tmp_path_factory: pytest.TempPathFactory) -> tuple[StageManifest, list[dict[str, Any]]]:
    """A training that went on past its best look at held-out pairs, and its metrics."""
    run = tmp_path_factory.mktemp("stopped")
    config = STOPS_EARLY.model_copy(update={"alarms": AlarmsConfig(**QUIET)})
    manifest = train(run, pairs=write_pairs(run / "pair", make_pairs(20, seed=6)), policy=base, config=config)
    return manifest, rows(stage_dir(run) / METRICS)


def test_figures_are_of_the_step_whose_weights_are_published(stopped: tuple[StageManifest, list[dict[str, Any]]]) -> None:
    manifest, metrics = stopped
    told = manifest.outcome.metrics
    kept, last = metrics[told["weights_of_step"] - 1], metrics[-1]
    assert told["stopped_early_at"] == told["steps"] == last["step"] > kept["step"]
    for name in ("loss", "margin", "kl", "held_out_loss", "held_out_accuracy", "held_out_margin"):
        assert told[f"last_{name}"] == kept[name], name
    assert kept["loss"] != last["loss"]
    assert kept["held_out_loss"] == min(row["held_out_loss"] for row in metrics if "held_out_loss" in row)


def test_page_and_card_say_the_loss_and_the_step_of_the_weights(stopped: tuple[StageManifest, list[dict[str, Any]]]) -> None:
    manifest, metrics = stopped
    told = manifest.outcome.metrics
    stages = (StageFigures("training", manifest.outcome),)
    text = Page(render_report(RoundData(run_id="r", run_dir="runs/r", round=1, training=metrics, stages=stages))).text
    step, steps = told["weights_of_step"], told["steps"]
    assert "sigmoid loss; forward packed" in text
    assert f"4 pairs held out, loss {told['last_held_out_loss']:.4g} at step {step}" in text
    assert f"stopped early after step {steps}; weights of step {step} of {steps}." in text
    card = render_card(facts(trained=(TrainedRound(1, 16, dict(told)),)))
    header, _, row = next(part for part in card.split("\n\n") if part.startswith("| round | pairs | steps")).splitlines()
    figures = dict(zip((cell.strip() for cell in header.split("|")), (cell.strip() for cell in row.split("|")), strict=True))
    assert (figures["steps"], figures["weights of step"]) == (str(steps), str(step))
    assert figures["loss"] == f"{told['last_loss']:.4g}"
    assert "Loss, accuracy, margin and KL are those of the step whose weights were kept." in card


class Blind(Breaks):
    """The objective, whose looks at held-out pairs find no number."""

    def sums(self, rows: Any, **estimates: Any) -> dict[str, torch.Tensor]:
        sums = super().sums(rows, **estimates)
        return sums if torch.is_grad_enabled() else {name: value * torch.nan for name, value in sums.items()}


def test_looks_that_are_no_numbers_stop_training_and_it_says_when(
    tmp_path: Path, base: PolicyRef, capsys: pytest.CaptureFixture[str]
) -> None:
    config = STOPS_EARLY.model_copy(update={"alarms": AlarmsConfig(**QUIET)})
    _, fitted, _ = attempt(base, tmp_path, config, kind=Blind)
    assert (fitted.stopped_early_at, fitted.weights_of_step, len(fitted.rows)) == (6, 6, 6)
    assert "stops early after step 6/16: 2 looks at held-out pairs in a row found no finite loss" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------- alarms


def raised(run: Path, base: PolicyRef, num_pairs: int, config: TrainingConfig) -> list[tuple[str, int]]:
    train(run, pairs=write_pairs(run / "pair", make_pairs(num_pairs)), policy=base, config=config)
    return [(alarm["name"], alarm["step"]) for alarm in rows(stage_dir(run) / ALARMS)]


def test_a_training_shorter_than_a_window_is_judged_at_its_end(tmp_path: Path, base: PolicyRef) -> None:
    low = AlarmsConfig(**QUIET | {"margin": AlarmLimits(warn=-1e9, stop=None)})
    assert raised(tmp_path / "three", base, 24, training_config(alarms=low)) == [("margin", 3)]
    assert raised(tmp_path / "two", base, 16, training_config(alarms=low)) == []


@pytest.mark.parametrize(
    ("loss", "found"), [(SigmoidLoss(kind="sigmoid"), [("clipped_share", 5)]), (SppoHardLoss(kind="sppo_hard"), [])]
)
def test_clipping_is_judged_only_where_it_is_not_usual(
    loss: Any, found: list[tuple[str, int]], tmp_path: Path, base: PolicyRef
) -> None:
    alarms = AlarmsConfig(**QUIET | {"clipped_share": AlarmLimits(warn=0.5, stop=None)})
    config = training_config(
        loss=loss, alarms=alarms, optimizer=OptimizerConfig(lr=1e-5, max_grad_norm=1e-4), held_out=HeldOutConfig(share=0)
    )
    assert raised(tmp_path, base, 40, config) == found
