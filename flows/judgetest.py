"""`dpo-loop judge-test CONFIG`: are the judges of a config fit? Asked through the run's ledger, so the run pays for nothing again."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from dpo_loop.errors import DpoLoopError, InputError
from dpo_loop.layout import RunDir
from flows.config import RunConfig
from flows.steps import import_from_here
from judges.accounts import Accounts
from judges.selftest.config import judges_to_test

UNFIT = 10


def judge_test(config: RunConfig, *, as_json: bool) -> int:
    """Prints the table and returns the exit code: 0 fit, 10 unfit. Raises InputError, exit code 2, for whatever kept the test from its end."""
    from judges.selftest.fitness import lines_of
    from judges.selftest.stage import JudgeTest, examine

    if judges := judges_to_test(config.judge, config.grading):
        import_from_here()
        run = RunDir(Path(config.run_dir))
        run.path.mkdir(parents=True, exist_ok=True)
        try:
            accounts = Accounts(run.ledger, config.budget)
            tested = asyncio.run(examine(judges, accounts, config.judge_test, report=lambda line: click.echo(line, err=True)))
        except DpoLoopError as error:
            raise InputError(f"the judge could not be tested: {error}") from error
        table = lines_of(tested.checks)
    else:
        tested, table = JudgeTest([], {}), ["the judge is a program, which is not tested by prose"]
    if as_json:
        click.echo(json.dumps(tested.as_json()))
    else:
        click.echo("\n".join([*table, "fit" if tested.is_fit else "NOT fit: a round with this judge does not start"]))
    return 0 if tested.is_fit else UNFIT
