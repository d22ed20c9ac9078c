"""Whoever decides a comparison: one judge, or a panel of them. Stages, grading and the self-test know nothing else.

`open_jury` is the one way from a judge's config to something that can be asked, with the run's ledger between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Protocol

from dpo_loop.types import Ballot, Prompt, Verdict
from judges.accounts import Accounts
from judges.asker import Asker, Candidate
from judges.backend import Backend, open_backend
from judges.budget import Purse
from judges.config import GuardGrader, Judge, PanelJudge, RemoteJudge, Single, members_of
from judges.ledger import Ledger
from judges.panel import Panel
from judges.rubric import load_rubric, reference_of


class Jury(Protocol):
    """An Asker is one. Failures of a vendor are ballots; only what makes going on pointless is raised: JudgeError, InputError,
    JudgeUnavailableError, BudgetExceededError."""

    @property
    def concurrency(self) -> int:
        """Prompts that are worth judging at once."""
        ...

    @property
    def in_waves(self) -> bool:
        """Calls of one prompt that need not wait for one another should not."""
        ...

    @property
    def num_asked(self) -> int:
        """Calls that were made."""
        ...

    @property
    def num_known(self) -> int:
        """Calls that the ledger answered."""
        ...

    async def ask(self, prompt: Prompt, left: Candidate, right: Candidate, *, replicate: int = 0) -> Ballot:
        """One look in one order: it selects what is compared, and never makes a label."""
        ...

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int = 0) -> Ballot:
        """One answer looked at alone: it selects too."""
        ...

    async def both_orders(
        self, prompt: Prompt, one: Candidate, other: Candidate, *, replicate: int = 0
    ) -> tuple[Verdict, tuple[Ballot, ...]]:
        """The verdict between two answers, and every ballot that made it: the only way to a label."""
        ...

    def figures(self) -> dict[str, Any]:
        """Who judged, calls asked and known, undecided calls by reason, tokens, dollars."""
        ...


@asynccontextmanager
async def open_jury(config: Judge, accounts: Accounts) -> AsyncIterator[Jury]:
    """Raises InputError if a judge cannot be opened: no such function, no key in the environment."""
    async with _opened(members_of(config), accounts) as (backends, ledger, purse):
        if isinstance(config, PanelJudge):
            yield Panel(config, [Asker(backend, ledger) for backend in backends], purse)
        else:
            yield Asker(backends[0], ledger, purse)


@asynccontextmanager
async def open_asker(config: Single | GuardGrader, accounts: Accounts) -> AsyncIterator[Asker]:
    """One judge or guard, for what a jury cannot be asked: a class. Raises as `open_jury`."""
    async with _opened([config], accounts) as ([backend], ledger, purse):
        yield Asker(backend, ledger, purse)


@asynccontextmanager
async def _opened(
    configs: Sequence[Single | GuardGrader], accounts: Accounts
) -> AsyncIterator[tuple[list[Backend], Ledger, Purse]]:
    with Ledger(accounts.ledger) as ledger:
        purse = await Purse.open(ledger, accounts)
        async with AsyncExitStack() as stack:
            backends = []
            for config in configs:
                backends.append(open_backend(config, purse, ledger))
                stack.push_async_callback(backends[-1].aclose)
            yield backends, ledger, purse


def check_references(judge: Judge, prompts: Iterable[Prompt]) -> None:
    """Before anything is spent. Raises InputError for a prompt without the reference that a rubric compares with."""
    for member in members_of(judge):
        if isinstance(member, RemoteJudge) and (rubric := load_rubric(member.rubric)).needs_reference:
            for prompt in prompts:
                reference_of(rubric, prompt)
