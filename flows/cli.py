"""`dpo-loop …`. Only click is imported here; every command imports what it needs, so that help and light stages start at once.

Exit codes: 0 done / PASS, 2 fix your input, 10 FAIL, 11 INCONCLUSIVE, 12 NEEDS_REVIEW, 13 INVALID, 75 try again, 1 a bug (with traceback).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from flows.gate_commands import gate, report
from flows.options import Command, decision_options, json_flag, run_argument, run_dir
from flows.shipping import card, export, serve_report

if TYPE_CHECKING:
    from dpo_loop.layout import RunDir
    from flows.config import RunConfig

INTERRUPTED = 130
DEMO_CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "configs" / "demo.yaml"


class _Group(click.Group):
    """Our own errors print their message and end with their code; anything else is a bug and shows its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        from dpo_loop.artifacts import storage_errors
        from dpo_loop.errors import DpoLoopError

        try:
            with storage_errors(Path.cwd()):
                return super().invoke(ctx)
        except DpoLoopError as error:
            click.echo(str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("stopped; the same command goes on where it was", err=True)
            ctx.exit(INTERRUPTED)


def _config_options(command: Command) -> Command:
    options = (
        click.option("--set", "overrides", multiple=True, metavar="a.b=c", help="Change a key of the config; the value is YAML."),
        click.option("--skip-bad-prompts", is_flag=True, help="Count unreadable prompts and go on (prompts.skip_bad=true)."),
        json_flag,
    )
    for option in reversed(options):
        command = option(command)
    return command


_risk_option = click.option(
    "--accept-judge-risk", "accepted", metavar="REASON", help="Play although the judge fails its self-test; kept with the round."
)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="dpo-loop")
def main() -> None:
    """Iterative DPO: generate, judge, pair, train, gate, promote, round after round.

    Every command may be run again after any crash: it goes on where it was.
    """


# ------------------------------------------------------------------------------------------------------------- playing


@main.command()
@_config_options
def demo(overrides: tuple[str, ...], skip_bad_prompts: bool, as_json: bool) -> None:
    """Play the tiny world, every part real, in minutes on a CPU (into runs/demo)."""
    from dpo_loop.errors import InputError

    if not DEMO_CONFIG.is_file():
        raise InputError(f"{DEMO_CONFIG} does not exist; the demo is run from a checkout of the project (pip install -e .)")
    _play(DEMO_CONFIG, overrides, skip_bad_prompts, as_json, one_round=False)


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_config_options
@_risk_option
def run(config: Path, overrides: tuple[str, ...], skip_bad_prompts: bool, as_json: bool, accepted: str | None) -> None:
    """Play the rounds of CONFIG, or go on with them, until a stop rule says stop."""
    _play(config, _with_risk(overrides, accepted), skip_bad_prompts, as_json, one_round=False)


@main.command(name="round")
@click.argument("config", type=click.Path(path_type=Path))
@_config_options
@_risk_option
def one_more_round(config: Path, overrides: tuple[str, ...], skip_bad_prompts: bool, as_json: bool, accepted: str | None) -> None:
    """Play one more round of CONFIG, whatever its stop rules say."""
    _play(config, _with_risk(overrides, accepted), skip_bad_prompts, as_json, one_round=True)


def _with_risk(overrides: tuple[str, ...], accepted: str | None) -> tuple[str, ...]:
    return overrides if accepted is None else (*overrides, f"judge_test.accept_risk={json.dumps(accepted, ensure_ascii=False)}")


def _play(path: Path, overrides: tuple[str, ...], skip_bad: bool, as_json: bool, *, one_round: bool) -> None:
    from flows.gate_checks import gate_warnings
    from flows.judge_checks import warnings
    from flows.play import play
    from flows.preflight import checked_config

    if skip_bad:
        overrides = (*overrides, "prompts.skip_bad=true")
    config: RunConfig = checked_config(path, overrides)
    for line in (*warnings(config), *gate_warnings(config)):
        click.echo(f"warning: {line}", err=True)
    sys.exit(play(config, one_round=one_round, as_json=as_json))


@main.command()
@click.argument("config", type=click.Path(path_type=Path))
@_config_options
@click.option(
    "--memory-gib", type=click.FloatRange(min=0, min_open=True), metavar="GIB", help="Would training fit a GPU of this size?"
)
def estimate(
    config: Path,
    overrides: tuple[str, ...],
    skip_bad_prompts: bool,  # noqa: ARG001 - an option of all configs
    as_json: bool,
    memory_gib: float | None,
) -> None:
    """What the judging of one round of CONFIG will cost, and the memory that its training takes; nothing is asked."""
    from rich.console import Console

    from flows import training_memory
    from flows.config import load_config
    from flows.estimate import lines_of, rows_of, table_of, told_of

    loaded = load_config(config, overrides)
    rows = rows_of(loaded)
    planned = training_memory.plan_of(loaded, memory_gib=memory_gib)
    told = told_of(rows, loaded) | {"training": training_memory.told_of(planned)}
    console = Console(width=None if sys.stdout.isatty() else 160)
    if rows:
        console.print(table_of(rows, told))
    for line in lines_of(rows, told):
        click.echo(line)
    if planned.plan is not None:
        console.print(training_memory.table_of(planned.plan, planned.place))
    for line in training_memory.lines_of(planned):
        click.echo(line)
    if as_json:
        click.echo(json.dumps(told))


@main.command(name="judge-test")
@click.argument("config", type=click.Path(path_type=Path))
@_config_options
def test_of_judge(config: Path, overrides: tuple[str, ...], skip_bad_prompts: bool, as_json: bool) -> None:  # noqa: ARG001 - options of all configs
    """Ask the judge of CONFIG what is known, and say whether it is fit. Exit code 0 fit, 10 unfit, 2 it could not be asked."""
    from flows.config import load_config
    from flows.judgetest import judge_test

    sys.exit(judge_test(load_config(config, overrides), as_json=as_json))


@main.command()
@click.argument("name")
@click.option("--run", "run", required=True, metavar="RUN", callback=run_dir, help="A run directory.")
@click.option("--round", "round_number", required=True, type=click.IntRange(min=0))
@json_flag
def step(name: str, run: RunDir, round_number: int, as_json: bool) -> None:
    """Run one stage of a round that has begun, or check that it is published. Flows start every stage this way."""
    from flows.steps import run_step
    from flows.supervise import die_with_parent

    die_with_parent()
    manifest = run_step(run, round_number, name)
    if as_json:
        click.echo(manifest.model_dump_json())
    else:
        click.echo(f"published at {run.round(round_number).stage(name)}")


# ------------------------------------------------------------------------------------------------------------- looking


@main.command()
@run_argument
@json_flag
def status(run: RunDir, as_json: bool) -> None:
    """What RUN does now: who plays it, which stage, its last line; or what it waits for."""
    from flows.show import run_status

    found = run_status(run)
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        if value not in (None, {}):
            lines = [f"{key}: {text}" for key, text in value.items()] if isinstance(value, dict) else value
            click.echo(f"{name.replace('_', ' ')}: " + ("\n  ".join(("", *lines)) if isinstance(lines, list) else str(lines)))


@main.command()
@run_argument
@click.argument("round_number", metavar="[ROUND]", required=False, type=click.IntRange(min=0))
@click.option("--pair", "pair_id", metavar="ID", help="A prompt's or a completion's id: every judge's reply behind its label.")
@json_flag
def show(run: RunDir, round_number: int | None, pair_id: str | None, as_json: bool) -> None:
    """The table of RUN's rounds, one round in detail, or one pair with all that made it."""
    if pair_id is not None:
        from flows.audit import audit, lines_of

        found = audit(run, pair_id, round_number)
        click.echo(json.dumps(found, ensure_ascii=False) if as_json else "\n".join(lines_of(found)))
        return
    from rich.console import Console

    from flows.show import print_round, print_run, run_json

    console = Console(width=None if sys.stdout.isatty() else 160)
    if round_number is not None:
        print_round(console, run, round_number)
    else:
        from flows.steps import read_run_config
        from flows.strengths import lines_of as told
        from flows.strengths import strengths_of

        print_run(console, run)
        for line in told(strengths_of(run, alpha=read_run_config(run).gate.alpha)):
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        click.echo(run_json(run, round_number))


# ------------------------------------------------------------------------------------------------------------ deciding


@main.command()
@decision_options
def approve(run: RunDir, round_number: int, reviewer: str, reason: str) -> None:
    """Promote the candidate of a ROUND that the gate could not decide."""
    _decide(run, round_number, True, reviewer, reason)


@main.command()
@decision_options
def reject(run: RunDir, round_number: int, reviewer: str, reason: str) -> None:
    """Keep the previous policy in a ROUND that the gate could not decide."""
    _decide(run, round_number, False, reviewer, reason)


def _decide(run: RunDir, round_number: int, approved: bool, reviewer: str, reason: str) -> None:
    from flows.approval import decide

    decision = decide(run, round_number, "approve" if approved else "reject", reviewer=reviewer, reason=reason)
    click.echo(f"round {round_number}: {decision.decision} by {decision.reviewer}, kept at {run.approval(decision.report_sha256)}")
    click.echo("Run the command that plays this run again to go on.")


@main.command()
@json_flag
def doctor(as_json: bool) -> None:
    """What this machine has: interpreter, packages, accelerator, memory, disk, Prefect."""
    from flows.doctor import examine

    findings = examine()
    if as_json:
        click.echo(json.dumps([finding._asdict() for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{'ok  ' if finding.ok else 'MISS'}  {finding.what:<12} {finding.found}")
            if not finding.ok:
                click.echo(f"      {'':<12} {finding.way_out}")
    sys.exit(0 if all(finding.ok for finding in findings) else 2)


for command in (gate, report, export, card, serve_report):
    main.add_command(command)


if __name__ == "__main__":
    main()
