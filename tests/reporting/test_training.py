"""What a page and a model card say of training: its alarms, its held-out pairs, how it was forwarded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from dpo_loop.config import KtoLoss, LoraShape, SigmoidLoss, TrainingConfig
from dpo_loop.reporting.model_card import TrainedRound, render_card
from dpo_loop.reporting.page import RoundData, render_report
from tests.reporting.browser import Watched
from tests.reporting.cases import figures, gate
from tests.reporting.rounds import curves
from tests.reporting.test_model_card import facts
from tests.reporting.test_page import Page

ALARMS = (
    {
        "name": "chosen_logprob_drop",
        "level": "warn",
        "step": 12,
        "value": 0.14,
        "limit": 0.1,
        "message": "step 12: chosen completions are 0.14 nats per token less likely than under the reference <b>",
    },
    {"name": "kl", "level": "stop", "step": 40, "value": math.nan, "limit": 0.2, "message": "step 40: the KL is no number"},
)
TRAINED = {
    "loss_kind": "sigmoid_norm",
    "steps": 50,
    "packed": False,
    "forward_reason": "padded: log-probs when packed differ by 0.4 nats",
    "held_out": 32,
    "last_held_out_loss": 0.5123,
    "stopped_early_at": 50,
    "weights_of_step": 40,
}


def looked_at(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """With a look at held-out pairs every ten steps."""
    looks = {"held_out_loss": 0.66, "held_out_accuracy": 0.61, "held_out_margin": 0.2}
    return [row | looks if row["step"] % 10 == 0 else row for row in rows]


def page(**changes: Any) -> str:
    values: dict[str, Any] = {"run_id": "r", "run_dir": "runs/r", "round": 2, "gate": gate(), "training": curves(0)}
    return render_report(RoundData(**(values | changes)))


def charts(html: str) -> dict[str, str]:
    """What is said of each chart, by its title."""
    told = [attrs["aria-label"] or "" for tag, attrs in Page(html).elements if tag == "svg" and attrs.get("class") == "chart"]
    return dict(each.split(" by step. ", 1) for each in told if " by step. " in each)


def test_alarms_stand_above_the_curves_with_level_and_message() -> None:
    html = page(alarms=ALARMS)
    text = Page(html).text
    assert "Alarms: 2 chosen logprob drop warn step 12: chosen completions are 0.14 nats per token less likely" in text
    assert "kl stop step 40: the KL is no number nan" in text
    assert "reference &lt;b&gt;" in html, "a message is text"
    assert text.index("Alarms: 2") < text.index("Reward margin")


def test_a_line_says_loss_rows_held_out_pairs_and_early_stop() -> None:
    text = Page(page(stages=(figures("training", **TRAINED),))).text
    assert (
        "sigmoid norm loss; forward padded: log-probs when packed differ by 0.4 nats; 32 pairs held out, loss 0.5123 at step 40; "
        "stopped early after step 50; weights of step 40 of 50. No alarm."
    ) in text
    packed = Page(page(stages=(figures("training", loss_kind="kto", packed=True, forward_reason="", held_out=0),))).text
    assert "kto loss; forward packed. No alarm." in packed


def test_held_out_figures_are_drawn_beside_those_of_training() -> None:
    drawn = charts(page(training=looked_at(curves(0)), nll_weight=0.0))
    assert "held-out pairs: 0.66 at 10, 0.66 at 60" in drawn["Preference loss"]
    assert "held-out pairs: 61.0 % at 10, 61.0 % at 60" in drawn["Preference accuracy"]
    assert "held-out pairs: 0.2 at 10" in drawn["Reward margin"]


def test_with_an_nll_term_the_whole_loss_is_drawn_beside_that_of_held_out_pairs() -> None:
    drawn = charts(page(training=looked_at(curves(0)), nll_weight=0.2))
    assert "held-out pairs" not in drawn["Preference loss"]
    assert {"loss: ", "held-out pairs: "} <= {part.split(": ")[0] + ": " for part in drawn["Loss"].split("; ")}


def test_every_look_of_a_long_training_is_drawn() -> None:
    rows = looked_at(curves(0, steps=1_207))
    html = page(training=rows)
    assert "held-out pairs: 0.66 at 10, 0.66 at 1200" in charts(html)["Loss"]
    assert len(html) < len(page(training=looked_at(curves(0, steps=400)))) * 1.5


def test_only_a_loss_that_starts_at_ln_2_is_said_to() -> None:
    assert "starts at ln 2" in Page(page(nll_weight=0.0, loss={"kind": "sigmoid", "wpo": False})).text
    assert "starts at ln 2" not in Page(page(nll_weight=0.0, loss={"kind": "ipo"})).text
    assert "starts at ln 2" not in Page(page(nll_weight=0.0, loss={"kind": "sigmoid", "wpo": True})).text


def test_a_round_of_an_earlier_version_has_curves_and_no_word_of_alarms() -> None:
    text = Page(page(stages=(figures("training", steps=60, first_loss=0.6931),))).text
    assert "Reward margin" in text
    assert "larm" not in text.split("Training", 2)[1].split("Reward margin")[0]


def test_the_training_panel_opens_without_a_complaint(tmp_path: Path, watched: Watched) -> None:
    path = tmp_path / "report.html"
    path.write_text(page(training=looked_at(curves(0)), alarms=ALARMS, stages=(figures("training", **TRAINED),)), encoding="utf-8")
    opened = watched.open(path)
    assert opened.locator(".alarms .chip").all_inner_texts() == ["warn", "stop"]
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_card_has_held_out_figures_where_a_round_has_them() -> None:
    old = TrainedRound(1, 500, {"steps": 8, "last_loss": 0.61})
    new = TrainedRound(
        2, 500, {"steps": 8, "last_loss": 0.6, "held_out": 25, "last_held_out_loss": 0.64, "last_held_out_accuracy": 0.61}
    )
    text = render_card(facts(trained=(old, new)))
    header, rule, first, second = next(
        part for part in text.split("\n\n") if part.startswith("| round | pairs | steps")
    ).splitlines()
    assert header.endswith("| pairs held out | their loss | their accuracy |")
    assert first.endswith("| – | – | – |")
    assert second.endswith("| 25 | 0.64 | 61.0 % |")
    assert {line.count("|") for line in (header, rule, first, second)} == {13}
    assert "held out" not in render_card(facts(trained=(old,)))


def test_a_card_names_the_loss_with_what_is_unusual_about_it_and_no_path() -> None:
    smoothed = TrainingConfig(loss=SigmoidLoss(kind="sigmoid", label_smoothing=0.1, wpo=True), lora=LoraShape(variant="dora"))
    text = render_card(facts(training=smoothed))
    assert "sigmoid loss, beta 0.1, wpo True, label smoothing 0.1; NLL weight" in text
    assert "target all-linear, dora." in text
    kto = render_card(facts(training=TrainingConfig(loss=KtoLoss(kind="kto"), feedback="/home/ann/thumbs.jsonl")))
    assert "kto loss, beta 0.1, with feedback from a file beside the pairs; NLL weight" in kto
    assert "ann" not in kto
