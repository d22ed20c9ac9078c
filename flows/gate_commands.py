"""`dpo-loop gate …` and `dpo-loop report`: the gate and its page over rows made by anybody, and what people settle about a run's gate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.options import Command, decision_options, json_flag

if TYPE_CHECKING:
    from dpo_loop.layout import RunDir


def _rows_options(command: Command) -> Command:
    """All are needed but --comparisons; `gate --schema` and the subcommands need none of them."""
    told = "JSON lines: prompt_id, side, policy, response, grade; category, cluster_id, prompt."
    options = (
        click.option("--rows", type=click.Path(path_type=Path), help=told),
        click.option(
            "--config", type=click.Path(path_type=Path), help="YAML with `checks`, or a run's config, of which `gate` is read."
        ),
        click.option(
            "--comparisons", type=click.Path(path_type=Path), help="JSON lines of comparisons, for checks of the win rate."
        ),
        click.option("--out", type=click.Path(path_type=Path), help="Folder for gate_report.json, junit.xml and the page."),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@_rows_options
@click.option("--schema", is_flag=True, help="Print the JSON Schema of gate_report.json, and do nothing else.")
@json_flag
@click.pass_context
def gate(
    ctx: click.Context,
    rows: Path | None,
    config: Path | None,
    comparisons: Path | None,
    out: Path | None,
    schema: bool,
    as_json: bool,
) -> None:
    """The gate alone, over graded answers of candidate, previous and anchor. Exit code: 0 PASS, 10 FAIL, 11 INCONCLUSIVE, 12 NEEDS_REVIEW, 13 INVALID."""
    if ctx.invoked_subcommand is not None:
        return
    if schema:
        from dpo_loop.types import GateReport

        click.echo(json.dumps(GateReport.model_json_schema()))
        return
    if rows is None or config is None or out is None:
        raise click.UsageError("--rows, --config and --out are needed")
    from flows.gating import gate_rows, tell

    decided = gate_rows(rows, config, out, comparisons).report
    tell(decided, as_json=as_json)
    sys.exit(decided.state.exit_code)


@gate.command()
@decision_options
def rebase(run: RunDir, round_number: int, reviewer: str, reason: str) -> None:
    """Make the policy of a promoted ROUND the anchor of the rounds to come, with which every candidate is compared."""
    from flows.terms import rebase as move

    moved = move(run, round_number, reviewer=reviewer, reason=reason)
    click.echo(
        f"the anchor of rounds to come is the policy of round {moved.round}, until now of round {moved.before}; kept at {run.anchors}"
    )


@gate.command()
@decision_options
@click.option("--check", "check_id", required=True, help="The id of a check or veto that was broken in ROUND.")
@click.option("--rounds", "num_rounds", required=True, type=click.IntRange(1, 10), help="For so many rounds after ROUND.")
def waive(run: RunDir, round_number: int, check_id: str, num_rounds: int, reviewer: str, reason: str) -> None:
    """Let a check that ROUND broke be broken in the rounds after it. One against the anchor still sends each of them to a person."""
    from flows.terms import waive as let

    waiver = let(run, round_number, check_id, num_rounds=num_rounds, reviewer=reviewer, reason=reason)
    click.echo(f"check {check_id} is waived up to round {waiver.expires_round}; kept at {run.waivers}")


@click.command()
@_rows_options
@click.option("--reveal", is_flag=True, help="Keep answers to harmful prompts in the page; by default they are left out.")
def report(rows: Path | None, config: Path | None, comparisons: Path | None, out: Path | None, reveal: bool) -> None:
    """The gate over rows made by anybody, and its page: report.html beside gate_report.json and junit.xml. Exit codes as of `gate`."""
    if rows is None or config is None or out is None:
        raise click.UsageError("--rows, --config and --out are needed")
    from flows.gating import gate_rows, write_page

    judged = gate_rows(rows, config, out, comparisons)
    page = write_page(judged, out, rows=rows, config=config, comparisons=comparisons, redact=not reveal)
    click.echo(f"{judged.report.state.value}: {page}")
    sys.exit(judged.report.state.exit_code)
