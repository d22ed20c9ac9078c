"""Who grades safety: a program, a judge that classifies, a guard, or one of them for harmful prompts and another for benign ones.

A call that was refused, cut off, late or not readable gives no grade: the answer is unscored, which counts as the worst case.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, assert_never

from dpo_loop.errors import InputError
from dpo_loop.exchange import HEURISTIC
from dpo_loop.types import Ballot, Classified, Grade, Prompt, Side
from judges.accounts import Accounts
from judges.asker import Asker, Candidate
from judges.config import GuardGrader, JudgeGrader, RefusalHeuristic, SafetyGrader, SideGrader, VerifierGrader, sides_of
from judges.figures import totals
from judges.graders import Grader, safety_program
from judges.jury import open_asker
from judges.rubric import load_rubric


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one answer. grade None: unscored. ballot None: a program found it."""

    grade: Grade | None
    rationale: str = ""
    ballot: Ballot | None = None


class _Side(Protocol):
    @property
    def asker(self) -> Asker | None: ...

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int) -> Finding: ...


class _Program:
    asker = None

    def __init__(self, grade: Grader) -> None:
        self._grade = grade

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int) -> Finding:  # noqa: ARG002 - it would say the same
        return Finding(self._grade(prompt, answer.text))


class _Model:
    def __init__(self, asker: Asker) -> None:
        self.asker = asker

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int) -> Finding:
        ballot = await self.asker.classify(prompt, answer, replicate=replicate)
        match ballot.outcome:
            case Classified(label=label, rationale=rationale):
                return Finding(Grade(label), rationale, ballot)
            case _:
                return Finding(None, ballot=ballot)


class Safety:
    """The graders of both sides as one. Raises what makes going on pointless: JudgeError, InputError, JudgeUnavailableError, BudgetExceededError."""

    def __init__(self, name: str, sides: Mapping[Side, _Side], names: Mapping[Side, str]) -> None:
        self.name, self._sides, self._names = name, sides, names
        self._askers = {side: grader.asker for side, grader in sides.items() if grader.asker}

    @property
    def concurrency(self) -> int:
        """Answers that are worth grading at once."""
        return max((asker.concurrency for asker in self._askers.values()), default=1)

    @property
    def num_asked(self) -> int:
        return sum(asker.num_asked for asker in set(self._askers.values()))

    @property
    def num_known(self) -> int:
        return sum(asker.num_known for asker in set(self._askers.values()))

    def name_on(self, side: Side) -> str:
        """Of the grader of a side."""
        return self._names[side]

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int = 0) -> Finding:
        """Of an answer to a harmful or a benign prompt."""
        return await self._sides[prompt.side].grade(prompt, answer, replicate=replicate)

    def figures(self) -> dict[str, Any]:
        """Who graded; of models also calls, tokens and dollars: their sums, and each under the sides that it grades."""
        each = {asker: asker.figures() for asker in self._askers.values()}
        if not each:
            return {"grader": self.name}
        sides = {side.value: each[asker] for side, asker in self._askers.items()}
        return {"grader": self.name, **totals(list(each.values())), "sides": sides}


@asynccontextmanager
async def open_safety(config: SafetyGrader, accounts: Accounts) -> AsyncIterator[Safety]:
    """Raises InputError if a grader cannot be opened: no such function, no key in the environment, a rubric that needs a reference."""
    async with AsyncExitStack() as stack:
        graders = list(sides_of(config).values())
        opened = [await _open(grader, accounts, stack) for grader in graders]
        names = [name_of(grader) for grader in graders]
        sides = {Side.HARMFUL: opened[0], Side.BENIGN: opened[-1]}
        yield Safety("; benign prompts: ".join(names), sides, {Side.HARMFUL: names[0], Side.BENIGN: names[-1]})


async def _open(grader: SideGrader, accounts: Accounts, stack: AsyncExitStack) -> _Side:
    match grader:
        case VerifierGrader() | RefusalHeuristic():
            return _Program(safety_program(grader))
        case JudgeGrader(judge=judge):
            if load_rubric(judge.rubric).needs_reference:
                raise InputError(
                    f"grading.safety: rubric {judge.rubric} compares with a reference, which prompts of safety do not have; use refusal-harm."
                )
            return _Model(await stack.enter_async_context(open_asker(judge, accounts)))
        case GuardGrader():
            return _Model(await stack.enter_async_context(open_asker(grader, accounts)))
        case _:
            assert_never(grader)


def name_of(grader: SideGrader) -> str:
    """As people read it in reports."""
    match grader:
        case VerifierGrader():
            return f"verifier:{grader.function}"
        case RefusalHeuristic():
            return HEURISTIC
        case JudgeGrader(judge=judge):
            return f"{judge.kind}:{judge.model} by rubric {judge.rubric}"
        case GuardGrader():
            return f"{grader.format}:{grader.model}"
        case _:
            assert_never(grader)
