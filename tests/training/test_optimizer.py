"""The learning rate over a training, worked out by hand."""

import pytest

from dpo_loop.config import OptimizerConfig
from dpo_loop.training.loop.optimizer import lr_at


def rates(schedule: str, *, num_steps: int, warmup_ratio: float) -> list[float]:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_ratio=warmup_ratio)
    return [lr_at(step, num_steps=num_steps, config=config) for step in range(num_steps)]


@pytest.mark.parametrize(
    ("schedule", "warmup_ratio", "expected"),
    [
        #               └ warm-up ┘  └──────── schedule ────────┘
        ("linear", 0.2, [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
        ("constant", 0.3, [1 / 3, 2 / 3, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", 0.0, [1.0, 0.9755, 0.9045, 0.7939, 0.6545, 0.5, 0.3455, 0.2061, 0.0955, 0.0245]),
        ("linear", 1.0, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
    ],
)
def test_the_rate_warms_up_and_follows_its_schedule(schedule: str, warmup_ratio: float, expected: list[float]) -> None:
    assert rates(schedule, num_steps=10, warmup_ratio=warmup_ratio) == pytest.approx(expected, abs=1e-4)


def test_no_step_is_wasted_at_zero_even_if_there_is_only_one() -> None:
    assert rates("linear", num_steps=1, warmup_ratio=0.1) == [1.0]
    assert rates("cosine", num_steps=1, warmup_ratio=0.0) == [1.0]
