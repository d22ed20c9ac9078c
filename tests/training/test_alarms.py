import math
from typing import Any

import pytest

from dpo_loop.config import AlarmLimits, AlarmsConfig
from dpo_loop.training.loop.alarms import Alarm, alarms_at

HEALTHY = {
    "loss": 0.6,
    "accuracy": 0.75,
    "margin": 0.8,
    "chosen_logprob_change": -0.02,
    "rejected_logprob_change": -0.2,
    "kl": 0.03,
    "falling": 0.45,
    "grad_norm": 0.6,
}
CONFIG = AlarmsConfig()
"""Windows of five steps."""


def run(num_steps: int, **changes: list[Any]) -> list[dict[str, Any]]:
    """Rows of a healthy run; a change gives the values of the last steps, None where the key is absent."""
    rows = [{"step": step + 1, **HEALTHY} for step in range(num_steps)]
    for key, values in changes.items():
        for row, value in zip(rows[-len(values) :], values, strict=True):
            row.pop(key, None)
            if value is not None:
                row[key] = value
    return rows


def raised(rows: list[dict[str, Any]], config: AlarmsConfig = CONFIG) -> dict[int, list[tuple[str, str]]]:
    """Name and level of what is raised at each step, for steps that raise anything."""
    at: dict[int, list[tuple[str, str]]] = {}
    for num in range(1, len(rows) + 1):
        if alarms := alarms_at(rows[:num], config, max_grad_norm=1.0):
            at[num] = [(alarm.name, alarm.level) for alarm in alarms]
    return at


def only(alarms: list[Alarm]) -> Alarm:
    (alarm,) = alarms
    return alarm


def test_a_healthy_run_raises_nothing_at_any_step() -> None:
    rows = run(40)
    for row in rows[9::10]:
        row["held_out_accuracy"] = 0.66
    assert raised(rows) == {}


@pytest.mark.parametrize(
    ("key", "bad", "name", "level"),
    [
        ("accuracy", 0.97, "accuracy", "warn"),
        ("margin", 6.0, "margin", "warn"),
        ("margin", 12.0, "margin", "stop"),
        ("chosen_logprob_change", -0.15, "chosen_logprob_drop", "warn"),
        ("chosen_logprob_change", -0.4, "chosen_logprob_drop", "stop"),
        ("rejected_logprob_change", -1.4, "rejected_logprob_drop", "warn"),
        ("falling", 0.8, "falling_share", "warn"),
        ("kl", 0.2, "kl", "warn"),
    ],
)
def test_a_figure_past_its_limit_for_a_window_raises_its_alarm_and_no_other(key: str, bad: float, name: str, level: str) -> None:
    alarms = alarms_at(run(12, **{key: [bad] * 5}), CONFIG, max_grad_norm=1.0)
    assert [(alarm.name, alarm.level) for alarm in alarms] == [(name, level)]


def test_an_alarm_is_raised_at_the_step_whose_window_passes_the_limit_and_not_before() -> None:
    # Windows of five, limits 5 and 10: the means after 8, 16, 16, 16 are 2.24, 5.28, 8.32, 11.36.
    rows = run(12, margin=[8.0, 16.0, 16.0, 16.0])
    assert raised(rows) == {10: [("margin", "warn")], 11: [("margin", "warn")], 12: [("margin", "stop")]}
    alarm = only(alarms_at(rows, CONFIG, max_grad_norm=1.0))
    assert (alarm.step, alarm.limit) == (12, 10.0)
    assert alarm.value == pytest.approx((0.8 + 8 + 3 * 16) / 5)


def test_one_odd_batch_raises_nothing() -> None:
    assert raised(run(12, kl=[0.3, 0.03, 0.03])) == {}


def test_nothing_is_raised_before_the_first_window_is_full() -> None:
    rows = run(5, margin=[99.0] * 5)
    assert raised(rows) == {5: [("margin", "stop")]}


def test_chosen_that_becomes_likelier_is_no_drop() -> None:
    assert raised(run(12, chosen_logprob_change=[0.9] * 5)) == {}


def test_the_gap_of_accuracies_is_that_of_the_window_and_the_look() -> None:
    rows = run(10, accuracy=[0.90] * 5, held_out_accuracy=[0.60])
    alarm = only(alarms_at(rows, CONFIG, max_grad_norm=1.0))
    assert (alarm.name, alarm.level) == ("accuracy_gap", "warn")
    assert alarm.value == pytest.approx(0.3)
    assert raised(rows) == {10: [("accuracy_gap", "warn")]}, "steps without a look do not judge it"


def test_low_held_out_accuracy_takes_two_looks_in_a_row() -> None:
    low, high = 0.5, 0.7
    rows = run(40, accuracy=[0.6] * 40)
    for row, accuracy in zip(rows[9::10], [low, high, low, low], strict=True):
        row["held_out_accuracy"] = accuracy
    assert raised(rows) == {40: [("held_out_accuracy", "warn")]}
    assert "below the limit 0.55" in alarms_at(rows, CONFIG, max_grad_norm=1.0)[0].message


def test_a_stop_limit_of_held_out_accuracy_is_a_lower_one() -> None:
    config = AlarmsConfig(held_out_accuracy=AlarmLimits(warn=0.55, stop=0.5))
    rows = run(20, accuracy=[0.55] * 20)
    rows[9]["held_out_accuracy"] = rows[19]["held_out_accuracy"] = 0.45
    assert only(alarms_at(rows, config, max_grad_norm=1.0)).level == "stop"


def test_the_share_of_clipped_steps_counts_all_steps_so_far() -> None:
    # Eight steps at 0.6, then clipped ones: 8 of 16 are half, 9 of 17 more than half.
    rows = run(17, grad_norm=[1.5] * 9)
    assert raised(rows) == {17: [("clipped_share", "warn")]}
    assert alarms_at(rows, CONFIG, max_grad_norm=2.0) == []


def test_a_reference_free_loss_is_judged_by_the_figures_that_it_has() -> None:
    absent = [None] * 12
    rows = run(12, chosen_logprob_change=absent, rejected_logprob_change=absent, kl=absent, falling=absent, margin=[11.0] * 12)
    assert set(raised(rows)) == {5, 6, 7, 8, 9, 10, 11, 12}
    assert only(alarms_at(rows, CONFIG, max_grad_norm=1.0)).name == "margin"


def test_rows_of_sft_raise_nothing() -> None:
    assert alarms_at([{"step": step, "loss": 2.0} for step in range(1, 20)], CONFIG, max_grad_norm=1.0) == []


@pytest.mark.parametrize("key", ["accuracy", "margin", "chosen_logprob_change", "rejected_logprob_change", "kl", "falling"])
def test_a_figure_that_is_not_a_number_is_past_every_limit(key: str) -> None:
    alarm = only(alarms_at(run(12, **{key: [math.nan]}), CONFIG, max_grad_norm=1.0))
    assert math.isnan(alarm.value)
    assert "nan" in alarm.message
    stops = getattr(CONFIG, alarm.name).stop is not None
    assert alarm.level == ("stop" if stops else "warn")


def test_a_held_out_accuracy_that_is_not_a_number_raises_its_alarms() -> None:
    rows = run(20, held_out_accuracy=[math.nan])
    rows[9]["held_out_accuracy"] = 0.7
    assert [alarm.name for alarm in alarms_at(rows, CONFIG, max_grad_norm=1.0)] == ["accuracy_gap", "held_out_accuracy"]


def test_limits_of_none_never_raise() -> None:
    config = AlarmsConfig(margin=AlarmLimits(warn=None, stop=None))
    assert alarms_at(run(12, margin=[99.0] * 5), config, max_grad_norm=1.0) == []


def test_without_a_stop_limit_a_figure_only_warns() -> None:
    config = AlarmsConfig(margin=AlarmLimits(warn=5.0, stop=None))
    assert only(alarms_at(run(12, margin=[99.0] * 5), config, max_grad_norm=1.0)).level == "warn"


def test_the_message_names_the_figure_the_limit_a_cause_a_remedy_and_the_key() -> None:
    message = only(alarms_at(run(12, chosen_logprob_change=[-0.4] * 5), CONFIG, max_grad_norm=1.0)).message
    for part in (
        "step 12",
        "0.4 nats per token",
        "0.3",
        "likelihood displacement",
        "nll_weight",
        "training.alarms.chosen_logprob_drop.stop",
    ):
        assert part in message


def test_every_limit_of_the_config_has_a_figure_that_can_pass_it() -> None:
    tight = {name: AlarmLimits(warn=1e9 if name == "held_out_accuracy" else -1e9, stop=None) for name in _limits()}
    rows = run(20, held_out_accuracy=[0.7])
    rows[9]["held_out_accuracy"] = 0.7
    assert {alarm.name for alarm in alarms_at(rows, AlarmsConfig(**tight), max_grad_norm=1.0)} == set(_limits())


def _limits() -> list[str]:
    return [name for name, field in AlarmsConfig.model_fields.items() if field.annotation is AlarmLimits]
