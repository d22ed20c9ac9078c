"""Arguments and options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from dpo_loop.layout import RunDir

Command = TypeVar("Command", bound=Callable[..., Any])


def run_dir(_ctx: click.Context, _param: click.Parameter, value: str) -> RunDir:
    from dpo_loop.layout import RunDir
    from flows.steps import read_run_config

    run = RunDir(Path(value).absolute())
    read_run_config(run)
    return run


run_argument = click.argument("run", metavar="RUN", callback=run_dir)
json_flag = click.option("--json", "as_json", is_flag=True, help="End with one JSON line for machines.")


def decision_options(command: Command) -> Command:
    for option in (
        click.option("--reason", required=True, help="Why; kept with the decision."),
        click.option("--reviewer", required=True, help="Your name; kept with the decision. A claim, not an identity."),
        click.argument("round_number", metavar="ROUND", type=click.IntRange(min=0)),
        run_argument,
    ):
        command = option(command)
    return command
