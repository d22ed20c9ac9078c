"""What the figures of training say when something is wrong.

A figure is a mean over the last `window_steps` steps, so that one odd batch raises nothing: before as many steps were made, nothing
is raised. A shorter training, of three steps at least, is judged at its end over all it has. Figures of held-out pairs are there only
on the steps that looked at them, and are judged on those. A figure that is not a number is past every limit.

facts/training.md §11 also stops where the margin doubles within 50 steps. That is not built: a margin starts at zero, so every
healthy run doubles it early on, and from the warning level of 5 a doubling is the stop limit of 10.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dpo_loop.config import AlarmLimits, AlarmsConfig, IpoLoss, Loss, OrpoLoss, SigmoidNormLoss, SimpoLoss, SppoHardLoss
from dpo_loop.types import Record

FEWEST_STEPS = 3
"""Of a training that is shorter than a window, for its figures to be judged."""
_OTHER_SCALE = (IpoLoss, SppoHardLoss, SigmoidNormLoss, SimpoLoss, OrpoLoss)
"""Losses with other gradients than those that max_grad_norm is made for, which are at most beta times that of a completion's log-prob:
squares, whose gradient grows as beta falls, and means per token, whose gradient grows as completions get shorter. Clipping is usual in
them, and since Adam divides by the size of its gradients it does no harm."""


class Alarm(Record):
    """step: the optimizer step, 1-based, at which `value` went past `limit`."""

    name: str
    level: Literal["warn", "stop"]
    step: int
    value: float
    limit: float
    message: str


@dataclass(frozen=True, slots=True)
class _Figure:
    """says: what was found, with the value formatted in. below: the limits are lower ones."""

    value: float | None
    says: str
    means: str
    below: bool = False


def limits_for(loss: Loss, config: AlarmsConfig) -> AlarmsConfig:
    """Those of the config that say something about this loss: clipped_share does not where gradients have another scale."""
    if not isinstance(loss, _OTHER_SCALE):
        return config
    return config.model_copy(update={"clipped_share": AlarmLimits(warn=None, stop=None)})


def alarms_at(
    rows: Sequence[Mapping[str, Any]], config: AlarmsConfig, *, max_grad_norm: float, is_last: bool = False
) -> list[Alarm]:
    """Alarms of the newest row of metrics.jsonl, given the rows so far; the caller raises each name and level once.

    is_last: no step comes after it. A name is there at most once, with the worse level that it reached. Keys that an objective does not have raise nothing.
    """
    fewest = min(FEWEST_STEPS, config.window_steps) if is_last else config.window_steps
    if len(rows) < fewest:
        return []
    figures = _figures(rows, min(config.window_steps, len(rows)), max_grad_norm)
    found = (_alarm(name, figure, getattr(config, name), rows[-1]["step"]) for name, figure in figures.items())
    return [alarm for alarm in found if alarm is not None]


def _figures(rows: Sequence[Mapping[str, Any]], window_steps: int, max_grad_norm: float) -> dict[str, _Figure]:
    window = rows[-window_steps:]
    over = f"mean over {window_steps} steps" if window_steps > 1 else "in one step"
    accuracy = _mean(window, "accuracy")
    looks = [row["held_out_accuracy"] for row in rows if "held_out_accuracy" in row] if "held_out_accuracy" in rows[-1] else []
    return {
        "accuracy": _Figure(
            accuracy,
            f"the policy prefers chosen in {{value:.1%}} of the pairs it trains on ({over})",
            "pairs this easy are often told apart by length or format, or learnt by heart; look at the length gap of the pairs, "
            "train fewer epochs, or take a lower optimizer.lr",
        ),
        "accuracy_gap": _Figure(
            accuracy - looks[-1] if accuracy is not None and looks else None,
            "accuracy is {value:.1%} points higher on the pairs trained on than on held-out pairs",
            "the pairs are learnt by heart; train fewer epochs, take a lower optimizer.lr, or set held_out.patience to stop in time",
        ),
        "held_out_accuracy": _Figure(
            _better_of_two(looks),
            "the policy prefers chosen in only {value:.1%} of the held-out pairs, in two looks in a row",
            "what is learnt does not hold for pairs that were never seen, or the labels are noise; look at the judge's agreement, "
            "make more pairs, or raise optimizer.lr if accuracy on the trained pairs is as low",
            below=True,
        ),
        "margin": _Figure(
            _mean(window, "margin"),
            f"the reward margin is {{value:.3g}} ({over})",
            "the policy moves far from the reference; take a lower optimizer.lr, a higher loss.beta or fewer epochs",
        ),
        "chosen_logprob_drop": _Figure(
            _drop(window, "chosen_logprob_change"),
            f"chosen completions are {{value:.3g}} nats per token less likely than under the reference ({over})",
            "likelihood displacement: the probability goes to answers that nobody chose, refusals may go first; take a lower "
            "optimizer.lr, or give nll_weight 0.2",
        ),
        "falling_share": _Figure(
            _mean(window, "falling"),
            f"in {{value:.0%}} of the pairs chosen is less likely than under the reference ({over})",
            "likelihood displacement in most pairs; give nll_weight 0.2, take a lower optimizer.lr, or drop pairs that are nearly alike",
        ),
        "rejected_logprob_drop": _Figure(
            _drop(window, "rejected_logprob_change"),
            f"rejected completions are {{value:.3g}} nats per token less likely than under the reference ({over})",
            "the policy unlearns rather than prefers; take a lower optimizer.lr or fewer epochs",
        ),
        "kl": _Figure(
            _mean(window, "kl"),
            f"the KL to the reference is {{value:.3g}} nats per token on the pairs ({over})",
            "the policy leaves the reference; take a lower optimizer.lr, a higher loss.beta or fewer epochs",
        ),
        "clipped_share": _Figure(
            _clipped_share(rows, max_grad_norm),
            f"the gradient was clipped at {max_grad_norm:g} in {{value:.0%}} of the steps so far",
            "the step is set by the clipping rather than by the learning rate; take a lower optimizer.lr, more pairs_per_step, or a "
            "higher optimizer.max_grad_norm",
        ),
    }


def _mean(window: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return fmean(row[key] for row in window) if all(key in row for row in window) else None


def _drop(window: Sequence[Mapping[str, Any]], key: str) -> float | None:
    change = _mean(window, key)
    return None if change is None else -change


def _better_of_two(looks: Sequence[float]) -> float | None:
    """Of the two newest looks: at the first one there may be nothing learnt yet. NaN if either is."""
    if len(looks) < 2:
        return None
    return math.nan if any(math.isnan(look) for look in looks[-2:]) else max(looks[-2:])


def _clipped_share(rows: Sequence[Mapping[str, Any]], max_grad_norm: float) -> float | None:
    return fmean(not row["grad_norm"] <= max_grad_norm for row in rows) if all("grad_norm" in row for row in rows) else None


def _alarm(name: str, figure: _Figure, limits: AlarmLimits, step: int) -> Alarm | None:
    levels: tuple[tuple[Literal["stop", "warn"], float | None], ...] = (("stop", limits.stop), ("warn", limits.warn))
    for level, limit in levels:
        if figure.value is None or limit is None or _within(figure, limit):
            continue
        side = "below" if figure.below else "above"
        return Alarm(
            name=name,
            level=level,
            step=step,
            value=figure.value,
            limit=limit,
            message=f"step {step}: {figure.says.format(value=figure.value)}, {side} the limit {limit:g} of training.alarms.{name}.{level}. "
            f"What it usually means and what to try: {figure.means}.",
        )
    return None


def _within(figure: _Figure, limit: float) -> bool:
    """Written so that NaN is not within any limit."""
    return figure.value is not None and (figure.value >= limit if figure.below else figure.value <= limit)
