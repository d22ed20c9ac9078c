"""What the Prefect UI shows of a round: one page of Markdown and one table, small, with every text from outside escaped.

They are a view. The record is the round's directory; a server that is gone or full costs the view only.
"""

from __future__ import annotations

import re
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from dpo_loop.artifacts import read_manifest
from dpo_loop.exchange import read_gate_report
from dpo_loop.layout import RunDir
from dpo_loop.types import CheckResult, RoundSummary
from flows.approval import how_to_decide
from flows.rounds import RoundState, state_of
from flows.show import interval, rate
from flows.steps import read_run_config
from flows.summary import row_of

MAX_TEXT = 600
MAX_ROWS = 100


def publish_round(run: RunDir, round_number: int) -> None:
    """The artifacts `<run_id>-round` (Markdown) and `<run_id>-gate` (table). Never raises: a view must not cost a round."""
    run_id = read_run_config(run).run_id
    try:
        create_markdown_artifact(round_markdown(run, round_number), key=f"{run_id}-round", description=f"Round {round_number}")
        create_table_artifact(gate_table(run, round_number), key=f"{run_id}-gate", description=f"Gate of round {round_number}")
    except Exception as error:  # the server is another program: it may be away, full or newer
        get_run_logger().warning("the artifacts of round %s could not be published: %s", round_number, error)


def round_markdown(run: RunDir, round_number: int) -> str:
    row = row_of(run, round_number)
    lines = [
        f"# {escape(read_run_config(run).run_id)}, round {round_number}: {row.gate.value if row.gate else 'the start policy, the anchor'}",
        "",
        f"**{'Promoted' if row.promoted else 'Not promoted; the previous policy stays'}.**",
        "",
        *(f"- {escape(reason)}" for reason in row.reasons),
        "",
        *_figures(row),
        "",
        "| stage | seconds |",
        "|---|---|",
        *(f"| {name} | {seconds:.1f} |" for name, seconds in row.seconds.items()),
        "",
        f"Report page: `{run.round(round_number).report_page}`" if row.report else "",
    ]
    if state_of(run, round_number) is RoundState.WAITING:
        lines += ["", "A person decides. Type one of:", "", "```", how_to_decide(run, round_number), "```"]
    return "\n".join(lines)


def _figures(row: RoundSummary) -> list[str]:
    return [
        "| figure | value |",
        "|---|---|",
        f"| pairs | {'–' if row.num_pairs is None else row.num_pairs} |",
        f"| pass rate | {rate(row.pass_rate)} |",
        f"| win rate vs previous | {interval(row.win_rate_previous, row.win_rate_previous_ci)} |",
        f"| win rate vs anchor | {interval(row.win_rate_anchor, row.win_rate_anchor_ci)} |",
        f"| harmful compliance | {rate(row.harmful_rate)} |",
        f"| over-refusal | {rate(row.over_refusal_rate)} |",
        f"| degenerate | {rate(row.degenerate_rate)} |",
    ]


def gate_table(run: RunDir, round_number: int) -> list[dict[str, Any]]:
    """One row per check; one row that says so where a round had none."""
    directory = run.round(round_number).stage("gate")
    checks: tuple[CheckResult, ...] = read_gate_report(directory).checks if read_manifest(directory) else ()
    rows = [
        {
            "round": round_number,
            "check": escape(check.id),
            "state": check.state.value,
            "value": rate(check.value),
            "reference": rate(check.reference),
            "interval": interval(check.delta if check.delta is not None else check.value, _ci(check)),
            "margin": rate(check.margin),
            "why": escape(check.why),
        }
        for check in checks
    ]
    gate = row_of(run, round_number).gate
    return rows[:MAX_ROWS] or [
        {"round": round_number, "check": "–", "state": gate.value if gate else "no gate", "why": "no check was made"}
    ]


def _ci(check: CheckResult) -> tuple[float, float] | None:
    return None if check.ci_low is None or check.ci_high is None else (check.ci_low, check.ci_high)


def escape(text: str) -> str:
    """Text that a model, a judge or a user wrote, made harmless in a Markdown line or table cell: no tags, links, fences or columns."""
    text = " ".join(text.split())
    if len(text) > MAX_TEXT:
        text = text[: MAX_TEXT - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]()#|!~])", r"\\\1", text)
