"""Stage `judgetest`: a judge below a floor is refused before its round makes or spends anything.

judge_test.json holds the checks, the floors they were held against, and why the round starts if one of them failed. Floors are no part of
the stage's key (JudgeTestConfig), so that file, and not the config of today, says under which floors a round began.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_loop.artifacts import Stage
from dpo_loop.errors import JudgeUnfitError
from dpo_loop.files import write_json
from dpo_loop.progress import say
from dpo_loop.types import StageOutcome
from judges.accounts import Accounts
from judges.config import Judge
from judges.jury import open_jury
from judges.selftest.config import JudgeTestConfig
from judges.selftest.fitness import Check, checks_of, is_fit, lines_of
from judges.selftest.golden import drift_slice, load_golden, trials_of
from judges.selftest.trial import run_trials

VERSION = 2
"""Also bumped when a check is computed in another way."""

JUDGE_TEST_FILE = "judge_test.json"


class JudgeTest(NamedTuple):
    checks: list[Check]
    figures: dict[str, dict[str, Any]]
    """Of each jury, by the name of its judge."""

    @property
    def is_fit(self) -> bool:
        return is_fit(self.checks)

    def as_json(self) -> dict[str, Any]:
        """notes: by the name of the check."""
        checks = [{name: value for name, value in check._asdict().items() if name != "note"} for check in self.checks]
        return {"fit": self.is_fit, "checks": checks, "notes": {check.name: check.note for check in self.checks if check.note}}

    def metrics(self) -> dict[str, Any]:
        calls = {name: sum(told[name] for told in self.figures.values()) for name in ("calls_asked", "calls_from_ledger")}
        return {"fit": self.is_fit, **calls, "judges": self.figures}


async def examine(
    judges: Mapping[str, Judge], accounts: Accounts, test: JudgeTestConfig, *, report: Callable[[str], None] = say
) -> JudgeTest:
    """judges: by name, as `judges_to_test` gives them. Where there are several, a check's name opens with that of its judge. After round 0 the
    ledger knows the answers of the whole set; a slice of it is asked anew each round, which shows a model that changed behind its name.

    Raises what makes asking pointless: InputError, JudgeError, JudgeUnavailableError, BudgetExceededError.
    """
    checks: list[Check] = []
    figures = {}
    for name, judge in judges.items():
        async with open_jury(judge, accounts) as jury:
            trials = trials_of(load_golden())
            results = await run_trials(jury, trials, name=name, say=report)
            again = []
            if accounts.round_number:
                again = await run_trials(
                    jury, drift_slice(trials), name=f"{name} again", say=report, replicate=accounts.round_number
                )
            figures[name] = jury.figures()
        prefix = f"{name}: " if len(judges) > 1 else ""
        checks += [check._replace(name=prefix + check.name) for check in checks_of(results, test, again)]
    return JudgeTest(checks, figures)


def judgetest_stage(accounts: Accounts) -> Stage:
    """The stage bound to a run's ledger and budget."""

    def run(out: Path, *, judges: Mapping[str, Judge], test: JudgeTestConfig, golden_sha256: str) -> StageOutcome:
        tested = asyncio.run(examine(judges, accounts, test))
        if not tested.is_fit and test.accept_risk is None:
            raise JudgeUnfitError(refusal(tested.checks))
        for line in lines_of(tested.checks):
            say(f"judgetest: {line}")
        accepted = None if tested.is_fit else test.accept_risk
        held = {"golden_sha256": golden_sha256, "floors": test.floors, "accepted_risk": accepted}
        write_json(out / JUDGE_TEST_FILE, tested.as_json() | held)
        return StageOutcome(metrics=tested.metrics() | {"accepted_risk": accepted})

    return Stage(name="judgetest", version=VERSION, run=run)


def refusal(checks: list[Check]) -> str:
    """The table and the ways out."""
    failed = ", ".join(check.name for check in checks if not check.ok)
    return "\n".join(
        [
            f"the judge is not fit to make labels: {failed}. The round does not start.",
            *lines_of(checks),
            "Ways out: another model, rubric or panel under `judge` or `grading.win_judge`; other floors under `judge_test`; or, where this "
            'is known and wanted, `--accept-judge-risk "reason"`, which is recorded with the round. Every answered call is kept.',
        ]
    )
