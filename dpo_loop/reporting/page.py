"""The report of a round as one self-contained page: opens from file://, asks the network for nothing, runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dpo_loop.config import METRIC_NAMES
from dpo_loop.reporting import text
from dpo_loop.reporting.svg import StyleSheet, interval_of_check, share_bar
from dpo_loop.types import GateReport, GateState, RoundSummary, StageOutcome

TEMPLATES = Path(__file__).parent / "templates"
RATES = ("pass_rate", "harmful_rate", "over_refusal_rate", "degenerate_rate")
RULE_NAMES = {"non_inferior": "no worse than", "ceiling": "stays below", "floor": "stays above", "veto": "newly bad below"}
NEXT_STEP = {
    GateState.PASS: "The candidate generates the next round. There is nothing to do.",
    GateState.FAIL: "The candidate is kept aside and never promoted; the previous policy generates the next round.",
    GateState.INVALID: "The round says nothing about a candidate. The previous policy stays; mend the cause and play the round again.",
    GateState.NEEDS_REVIEW: "A person has to decide. Until then the previous policy stays. Read the samples below, then run one of:",
    GateState.INCONCLUSIVE: "There is too little evidence to decide, so a person has to. Until then the previous policy stays. Run one of:",
}


@dataclass(frozen=True, slots=True)
class StageFigures:
    """What a stage counted: shown as it was recorded in its manifest."""

    name: str
    outcome: StageOutcome


@dataclass(frozen=True, slots=True)
class RoundData:
    """All that a page shows; None or empty is a stage that did not happen."""

    run_id: str
    run_dir: str
    round: int
    gate: GateReport | None = None
    gate_sha256: str | None = None
    history: tuple[RoundSummary, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[StageFigures, ...] = ()
    training: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Mapping[str, Any]] = ()
    num_samples: int = 0


def render_report(data: RoundData) -> str:
    """The HTML of a round's report."""
    from dpo_loop.reporting.curves import training_charts, trend_charts  # matplotlib takes half a second to import

    sheet = StyleSheet()
    trends, training = trend_charts(data.history, sheet), training_charts(data.training, sheet)
    script = Markup((TEMPLATES / "samples.js").read_text(encoding="utf-8"))
    css = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8") + sheet.css)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            gate=data.gate,
            own=data.history[-1] if data.history else None,
            banner=_banner(data),
            checks=[
                (check, Markup(svg) if (svg := interval_of_check(check)) else None)
                for check in (data.gate.checks if data.gate else ())
            ],
            rates=_rates_table(data),
            trends=trends,
            training=training,
            seconds=_seconds(data.seconds),
            samples_json=Markup(text.json_for_script(data.samples)),
            css=css,
            script=script,
            style_hash=csp_hash(css),
            script_hash=csp_hash(script),
        )
    )


def environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "percent": text.percent,
        "interval": text.interval,
        "points": text.points,
        "duration": text.duration,
        "figure": text.figure,
        "visible": text.visible,
        "metric": lambda name: METRIC_NAMES.get(name, name),
        "rule": lambda name: RULE_NAMES.get(name, name),
        "words": lambda name: str(name).replace("_", " "),
        "share_bar": lambda share: Markup(share_bar(share)),
        "scalars": lambda figures: {k: v for k, v in figures.items() if v is None or isinstance(v, bool | int | float | str)},
    }
    return made


def csp_hash(content: str) -> str:
    """What a Content-Security-Policy names an inline script or style by."""
    return "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


def _banner(data: RoundData) -> dict[str, Any]:
    """state, reason (one sentence), next step, commands to copy, further reasons."""
    if data.gate is None:
        start = data.round == 0
        return {
            "state": "START" if start else "NO GATE",
            "kind": "start" if start else "invalid",
            "reason": "The start policy, answered and graded: the anchor that every later round is compared with." if start else
            "The round ended before its gate decided anything.",
            "next": "There is nothing to do." if start else "The previous policy stays.",
            "commands": [],
            "more": [],
        }  # fmt: skip
    state = data.gate.state
    run = shlex.quote(data.run_dir)
    commands = [f'dpo-loop {verb} {run} {data.round} --reviewer "your name" --reason "why"' for verb in ("approve", "reject")]
    first, *more = data.gate.reasons or ("no reason was recorded",)
    return {
        "state": state.value.replace("_", " "),
        "kind": state.value.lower(),
        "reason": first[:1].upper() + first[1:],
        "next": NEXT_STEP[state],
        "commands": commands if state.waits_for_person else [],
        "more": more,
    }


@dataclass(frozen=True, slots=True)
class RatesTable:
    policies: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


def _rates_table(data: RoundData) -> RatesTable | None:
    """From the gate's report; without one (round 0) what the history knows of the round's own policy."""
    if data.gate is not None and data.gate.rates:
        rates = data.gate.rates
    elif data.history:
        rates = {"candidate": {name: getattr(data.history[-1], name) for name in RATES}}
    else:
        return None
    policies = tuple(policy for policy in ("candidate", "previous", "anchor") if policy in rates)
    rows = ((name, tuple(rates[policy].get(name) for policy in policies)) for name in RATES)
    known = tuple(row for row in rows if any(value is not None for value in row[1]))
    return RatesTable(policies, known) if known else None


def _seconds(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    longest = max(seconds.values(), default=0.0)
    return [(name, spent, spent / longest if longest > 0 else 0.0) for name, spent in seconds.items()]
