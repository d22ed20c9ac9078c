"""Which line charts a report has: trends over rounds, training curves from train/metrics.jsonl, lengths of answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpo_loop.reporting.answers import REFERENCES, Case
from dpo_loop.reporting.charts import Chart, Series, line_chart
from dpo_loop.reporting.svg import StyleSheet
from dpo_loop.types import RoundSummary, Side

_MAX_POINTS = 400

_PREFERENCE_LOSS = "preference_loss"
"""Not in metrics.jsonl: what is left of `loss` without the weighted NLL."""
_HELD_OUT_PREFERENCE_LOSS = "held_out_preference_loss"
_LN_2_LOSSES = ("sigmoid", "sigmoid_norm", "robust")
_LN_2 = "starts at ln 2 = 0.693 when the policy is the reference"

# (title, note, {name in metrics.jsonl: label}, in percent, line at)
_TRAINING: tuple[tuple[str, str, Mapping[str, str], bool, float | None], ...] = (
    ("Preference loss", _LN_2, {_PREFERENCE_LOSS: "loss", _HELD_OUT_PREFERENCE_LOSS: "held-out pairs"}, False, math.log(2)),
    ("NLL of chosen", "per token, in nats; the other part of the loss", {"nll": "NLL"}, False, None),
    ("Loss", "of the preference and of what else it may hold", {"loss": "loss", "held_out_loss": "held-out pairs"}, False, None),
    ("Reward margin", "chosen over rejected", {"margin": "margin", "held_out_margin": "held-out pairs"}, False, 0.0),
    (
        "Log-prob change per token",
        "against the reference; both falling is likelihood displacement",
        {"chosen_logprob_change": "chosen", "rejected_logprob_change": "rejected"},
        False,
        0.0,
    ),
    (
        "Preference accuracy",
        "pairs whose chosen answer has the higher reward",
        {"accuracy": "accuracy", "held_out_accuracy": "held-out pairs"},
        True,
        0.5,
    ),
    ("KL estimate", "from the reference on the pairs' own answers, nats per token", {"kl": "KL"}, False, 0.0),
    ("Gradient norm", "before clipping", {"grad_norm": "norm"}, False, None),
)


def trend_charts(history: Sequence[RoundSummary], sheet: StyleSheet) -> list[Chart]:
    """Once two rounds have rates. A hollow marker is a round that was not promoted."""
    graded = [
        row for row in history if row.harmful_rate is not None or row.win_rate_anchor is not None or row.pass_rate is not None
    ]
    return [chart for chart in _trends(graded, sheet) if chart is not None] if len(graded) > 1 else []


def training_charts(
    rows: Sequence[Mapping[str, Any]], sheet: StyleSheet, *, nll_weight: float | None = None, loss: Mapping[str, Any] | None = None
) -> list[Chart]:
    """nll_weight: of the NLL of chosen in `loss`; None where nobody knows it, and only the whole loss can be drawn. loss: of the
    config; None is what was trained before there was a choice, sigmoid."""
    looked = any("held_out_loss" in row for row in rows)
    parted = [_parted(row, nll_weight, whole=looked) for row in rows]
    # WPO weighs each pair by its likelihood, from the first step on.
    from_ln_2 = loss is None or (loss["kind"] in _LN_2_LOSSES and not loss.get("wpo"))
    return [chart for chart in _training(parted, sheet, from_ln_2=from_ln_2) if chart is not None]


def _parted(row: Mapping[str, Any], nll_weight: float | None, *, whole: bool) -> Mapping[str, Any]:
    """Either the parts of the loss or the whole of it; both where the whole is also known of held-out pairs."""
    loss, nll = _number(row.get("loss")), _number(row.get("nll"))
    if nll_weight is None or loss is None or (nll is None and nll_weight):
        return {name: value for name, value in row.items() if name != "nll"}
    if not nll_weight:
        names = {"loss": _PREFERENCE_LOSS, "held_out_loss": _HELD_OUT_PREFERENCE_LOSS}
        return {names.get(name, name): value for name, value in row.items() if name != "nll"}
    kept = {name: value for name, value in row.items() if whole or name != "loss"}
    return kept | {_PREFERENCE_LOSS: loss - nll_weight * (nll or 0.0)}


def _trends(history: Sequence[RoundSummary], sheet: StyleSheet) -> Iterator[Chart | None]:
    hollow = frozenset(float(row.round) for row in history if not row.promoted)

    def of(label: str, name: str, ci: str | None = None, rows: Sequence[RoundSummary] = history) -> Series:
        intervals = tuple(getattr(row, ci) for row in rows) if ci else ()
        return Series(label, tuple((row.round, getattr(row, name)) for row in rows), intervals, hollow)

    same_anchor = [row for row in history if row.anchor_round == history[-1].anchor_round]

    yield line_chart(
        "Pass rate", [of("pass rate", "pass_rate")], sheet, note="share of tasks passed", x_name="round", in_percent=True
    )
    yield line_chart(
        "Win rate",
        [
            of("vs anchor", "win_rate_anchor", "win_rate_anchor_ci", same_anchor),
            of("vs previous", "win_rate_previous", "win_rate_previous_ci"),
        ],
        sheet,
        note="an even match is 50 %; bars are the interval",
        x_name="round",
        in_percent=True,
        reference=0.5,
    )
    yield line_chart(
        "Harm and over-refusal",
        [of("harmful", "harmful_rate"), of("over-refusal", "over_refusal_rate"), of("degenerate", "degenerate_rate")],
        sheet,
        note="lower is better, both together",
        x_name="round",
        in_percent=True,
    )


def _training(rows: Sequence[Mapping[str, Any]], sheet: StyleSheet, *, from_ln_2: bool) -> Iterator[Chart | None]:
    every = max(1, math.ceil(len(rows) / _MAX_POINTS))
    for title, note, names, in_percent, reference in _TRAINING:
        series = []
        for name, label in names.items():
            there = [(float(row.get("step", index + 1)), _number(row[name])) for index, row in enumerate(rows) if name in row]
            if any(value is not None for _, value in there):
                # Held-out pairs are looked at so rarely that every look is drawn.
                kept = [point for index, point in enumerate(there) if len(there) <= _MAX_POINTS or index % every == 0]
                series.append(Series(label, tuple(kept if kept[-1] == there[-1] else [*kept, there[-1]])))
        unknown = note == _LN_2 and not from_ln_2
        yield line_chart(
            title,
            series,
            sheet,
            note="" if unknown else note,
            x_name="step",
            in_percent=in_percent,
            reference=None if unknown else reference,
        )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def length_chart(cases: Sequence[Case], sheet: StyleSheet, *, num_bins: int = 24) -> Chart | None:
    """Share of answers to tasks and benign prompts by their length, up to the 99th percentile of all."""
    tokens = {
        policy: [case.rows[policy].num_tokens for case in cases if policy in case.rows and case.side is not Side.HARMFUL]
        for policy in ("candidate", *REFERENCES)
    }
    together = sorted(value for values in tokens.values() for value in values)
    if not together or together[0] == together[-1]:
        return None
    width = max(1, math.ceil(together[min(len(together) - 1, len(together) * 99 // 100)] / num_bins))
    return line_chart(
        "Length of answers",
        [
            Series(policy, tuple((width * (bin + 0.5), counts[bin] / len(values)) for bin in range(num_bins + 1)), marked=False)
            for policy, values in tokens.items()
            if values and (counts := Counter(min(value // width, num_bins) for value in values))
        ],
        sheet,
        note="share of answers to tasks and benign prompts",
        x_name="tokens",
        in_percent=True,
    )
