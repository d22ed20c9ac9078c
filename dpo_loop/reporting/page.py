"""The report of a round as one self-contained page: opens from file://, asks the network for nothing, runs only its own script."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from dpo_loop.config import METRIC_NAMES
from dpo_loop.exchange import GRADES
from dpo_loop.reporting import text
from dpo_loop.reporting.answers import REFERENCES, Case
from dpo_loop.reporting.banner import banner_of
from dpo_loop.reporting.figures import RATES, history_with_gate, passing_chance
from dpo_loop.reporting.health import StageFigures, agreements_of, bills_of, signs_of, total_cost
from dpo_loop.reporting.provenance import hashes_of, reproduce_commands, versions_of
from dpo_loop.reporting.samples import Samples
from dpo_loop.reporting.svg import StyleSheet, interval_of_check, share_bar
from dpo_loop.reporting.tables import category_rows, change_counts, length_rows, openings, transitions
from dpo_loop.types import CheckResult, GateReport, RoundSummary

TEMPLATES = Path(__file__).parent / "templates"
SCRIPTS = ("diff.js", "labels.js", "samples.js")
RULE_NAMES = {"non_inferior": "no worse than", "ceiling": "stays below", "floor": "stays above", "veto": "newly bad below"}


@dataclass(frozen=True, slots=True)
class RoundData:
    """All that a page shows; None or empty is a stage that did not happen. run_dir None: rows that belong to no run, and so to no round. index: link
    to the page over all rounds, None where there is none. answers_files: where all answers are, as a person types it. commands: what makes the page again.
    nll_weight: of the NLL in the training loss, loss: as configured, None where they are not known. alarms: rows of train/alarms.jsonl."""

    run_id: str
    run_dir: str | None
    round: int
    gate: GateReport | None = None
    gate_sha256: str | None = None
    history: tuple[RoundSummary, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    stages: tuple[StageFigures, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    training: Sequence[Mapping[str, Any]] = ()
    cases: Sequence[Case] = ()
    samples: Samples = field(default_factory=Samples)
    index: str | None = "../../../index.html"
    answers_files: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    nll_weight: float | None = None
    loss: Mapping[str, Any] | None = None
    alarms: Sequence[Mapping[str, Any]] = ()

    @property
    def name(self) -> str:
        """Of what the page is about."""
        return self.run_id if self.run_dir is None else f"{self.run_id} round {self.round}"

    @property
    def answers_place(self) -> str:
        return " and ".join(self.answers_files) or GRADES


def render_report(data: RoundData) -> str:
    """The HTML of a round's report."""
    from dpo_loop.reporting.curves import length_chart, training_charts, trend_charts  # matplotlib takes half a second to import
    from dpo_loop.reporting.plane import plane_charts

    sheet, gate = StyleSheet(), _without_sealed_ids(data.gate, data.cases)
    bills, history = bills_of(data.stages), history_with_gate(data.history, gate)
    one_reference = _anchor_is_previous(gate)
    shown: dict[str, Any] = {
        "banner": banner_of(gate, run_dir=data.run_dir, round_number=data.round),
        "changes": change_counts(data.cases),
        "checks": [(check, _drawing(check)) for check in (gate.checks if gate else ()) if check.rule != "veto"],
        "vetoes": [check for check in (gate.checks if gate else ()) if check.rule == "veto"],
        "rates": _rates_table(history, gate, one_reference=one_reference),
        "planes": plane_charts(history, gate, sheet),
        "trends": trend_charts(history, sheet),
        "categories": category_rows(data.cases),
        "transitions": transitions(data.cases, references=REFERENCES[: 1 if one_reference else 2]),
        "one_reference": one_reference,
        "lengths": length_rows(data.cases),
        "length_chart": length_chart(data.cases, sheet),
        "openings": openings(data.cases),
        "training": training_charts(data.training, sheet, nll_weight=data.nll_weight, loss=data.loss),
        "trained": next((dict(stage.outcome.metrics) for stage in data.stages if stage.name == "training"), {}),
        "slim": passing_chance(gate),
        "signs": signs_of(data.stages),
        "agreements": agreements_of(data.stages),
        "bills": bills,
        "cost": total_cost(bills),
        "seconds": _seconds(data.seconds),
        "hashes": hashes_of(gate, data.gate_sha256, of_run=data.run_dir is not None),
        "versions": versions_of(gate, data.versions),
        "commands": reproduce_commands(data.run_dir, data.round, has_gate=gate is not None, given=data.commands),
    }
    script = Markup("\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS))
    css = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8") + sheet.css)
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            data=data,
            gate=gate,
            own=history[-1] if history else None,
            samples_json=Markup(text.json_for_script(_for_script(data))),
            css=css,
            script=script,
            style_hash=csp_hash(css),
            script_hash=csp_hash(script),
            **shown,
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
        "dollars": text.dollars,
        "visible": text.visible,
        "flat": text.flat,
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


def _for_script(data: RoundData) -> dict[str, Any]:
    round_number = None if data.run_dir is None else data.round
    return {
        "run_id": data.run_id,
        "round": round_number,
        "answers": text.visible(data.answers_place),
        "gate_report_sha256": data.gate_sha256,
        "samples": data.samples.shown,
    }


def _without_sealed_ids(gate: GateReport | None, cases: Sequence[Case]) -> GateReport | None:
    """A reason may name a prompt; a sealed one it names in the gate report alone."""
    sealed = [re.escape(case.prompt.id) for case in cases if case.is_sealed]
    if gate is None or not sealed:
        return gate
    names = re.compile(rf"\b(?:{'|'.join(sealed)})\b")
    return gate.model_copy(
        update={
            "reasons": tuple(names.sub("a sealed prompt", reason) for reason in gate.reasons),
            "validity": tuple({**item, "why": names.sub("a sealed prompt", item["why"])} for item in gate.validity),
            "checks": tuple(check.model_copy(update={"why": names.sub("a sealed prompt", check.why)}) for check in gate.checks),
        }
    )


def _anchor_is_previous(gate: GateReport | None) -> bool:
    return gate is not None and gate.previous.key == gate.anchor.key


def _drawing(check: CheckResult) -> Markup | None:
    svg = interval_of_check(check)
    return Markup(svg) if svg else None


@dataclass(frozen=True, slots=True)
class RatesTable:
    policies: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


def _rates_table(history: Sequence[RoundSummary], gate: GateReport | None, *, one_reference: bool) -> RatesTable | None:
    """From the gate's report; without one (round 0) what the history knows of the round's own policy."""
    if gate is not None and gate.rates:
        rates = gate.rates
    elif history:
        rates = {"candidate": {name: getattr(history[-1], name) for name in RATES}}
    else:
        return None
    shown = ("candidate", "previous") if one_reference else ("candidate", "previous", "anchor")
    policies = tuple(policy for policy in shown if policy in rates)
    rows = ((name, tuple(rates[policy].get(name) for policy in policies)) for name in RATES)
    known = tuple(row for row in rows if any(value is not None for value in row[1]))
    return RatesTable(policies, known) if known else None


def _seconds(seconds: Mapping[str, float]) -> list[tuple[str, float, float]]:
    longest = max(seconds.values(), default=0.0)
    return [(name, spent, spent / longest if longest > 0 else 0.0) for name, spent in seconds.items()]
