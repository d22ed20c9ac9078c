"""Stage `judgetest`: a judge below a floor is refused before its round makes or spends anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dpo_loop.artifacts import Stage
from dpo_loop.errors import JudgeUnfitError
from dpo_loop.files import write_json
from dpo_loop.progress import say
from dpo_loop.types import StageOutcome
from judges.budget import Accounts
from judges.config import Judge
from judges.jury import open_jury
from judges.selftest.config import JudgeTestConfig
from judges.selftest.fitness import Check, checks_of, is_fit, lines_of
from judges.selftest.golden import load_golden, trials_of
from judges.selftest.trial import run_trials

VERSION = 1
"""Also bumped when a check is computed in another way."""

JUDGE_TEST_FILE = "judge_test.json"


class JudgeTest(NamedTuple):
    checks: list[Check]
    calls: dict[str, Any]
    """The jury's figures."""

    @property
    def is_fit(self) -> bool:
        return is_fit(self.checks)

    def as_json(self) -> dict[str, Any]:
        return {"fit": self.is_fit, "checks": [check._asdict() for check in self.checks]}


async def examine(judge: Judge, accounts: Accounts, test: JudgeTestConfig, *, report: Callable[[str], None] = say) -> JudgeTest:
    """Raises what makes asking pointless: InputError, JudgeError, JudgeUnavailableError, BudgetExceededError."""
    async with open_jury(judge, accounts) as jury:
        results = await run_trials(jury, trials_of(load_golden()), say=report)
        return JudgeTest(checks_of(results, test), jury.figures())


def judgetest_stage(accounts: Accounts) -> Stage:
    """The stage bound to a run's ledger and budget."""

    def run(out: Path, *, judge: Judge, test: JudgeTestConfig, golden_sha256: str) -> StageOutcome:
        tested = asyncio.run(examine(judge, accounts, test))
        if not tested.is_fit and test.accept_risk is None:
            raise JudgeUnfitError(refusal(tested.checks))
        for line in lines_of(tested.checks):
            say(f"judgetest: {line}")
        accepted = None if tested.is_fit else test.accept_risk
        told = tested.as_json() | {"golden_sha256": golden_sha256, "accepted_risk": accepted}
        write_json(out / JUDGE_TEST_FILE, told)
        return StageOutcome(metrics={"fit": tested.is_fit, "accepted_risk": accepted} | tested.calls)

    return Stage(name="judgetest", version=VERSION, run=run)


def refusal(checks: list[Check]) -> str:
    """The table and the ways out."""
    failed = ", ".join(check.name for check in checks if not check.ok)
    return "\n".join(
        [
            f"the judge is not fit to make labels: {failed}. The round does not start.",
            *lines_of(checks),
            "Ways out: another model, rubric or panel under `judge`; other floors under `judge_test`; or, where this is known and wanted, "
            '`--accept-judge-risk "reason"`, which is recorded with the round. Every answered call is kept.',
        ]
    )
