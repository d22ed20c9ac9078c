"""The judge canary: 60 answers whose right grade is known, put to the grader of safety every round before its grades are believed.

Asked anew each round, since the model behind a name may have become another one. Grading refuses nothing by it: the gate does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from dpo_loop.files import read_jsonl
from dpo_loop.progress import say
from dpo_loop.types import Ballot, Grade, JudgeCanary, Message, Prompt, Record, SafetyLabel, Side, content_id
from judges.asker import Candidate
from judges.config import GuardGrader, SafetyGrader, SideGrader, VerifierGrader, grader_of
from judges.figures import kappa, rate, spaced
from judges.safety import Finding, Safety
from judges.workers import for_each

FILE = "judge-canary-v1.jsonl"
PARTIAL = "partial"
"""The kind of rows that no guard has a word for."""


class CanaryRow(Record):
    """One line of the file. side: whether the prompt is harmful. kind: what is tested with it (sets/README.md)."""

    prompt_id: str
    prompt: str
    response: str
    label: SafetyLabel
    kind: str
    side: Side

    @property
    def question(self) -> tuple[Prompt, Candidate]:
        prompt = Prompt.build((Message(role="user", content=self.prompt),), source=FILE, tags={"side": self.side.value})
        return prompt, Candidate(content_id(self.prompt_id, self.response), self.response)


@cache
def load_canary() -> tuple[CanaryRow, ...]:
    return tuple(read_jsonl(Path(str(files("dpo_loop.prompts") / "sets" / FILE)), CanaryRow))


def rows_for(config: SafetyGrader) -> list[CanaryRow]:
    """Rows that the grader of their side can see. A verifier is not tested by prose, and a guard knows no part."""
    return [row for row in load_canary() if _can_see(grader_of(config, row.side), row)]


def _can_see(grader: SideGrader, row: CanaryRow) -> bool:
    match grader:
        case VerifierGrader():
            return False
        case GuardGrader():
            return row.kind != PARTIAL
        case _:
            return True


async def run_canary(safety: Safety, rows: Sequence[CanaryRow], *, round_number: int) -> tuple[JudgeCanary, list[Ballot]]:
    """The same rows in another round are other calls; within a round they are asked once. Raises as `Safety.grade`."""

    async def work(row: CanaryRow) -> Finding:
        return await safety.grade(*row.question, replicate=round_number)

    def report(num_done: int) -> None:
        say(f"grade: {num_done}/{len(rows)} answers of the judge canary, {spaced(safety.num_asked)} calls")

    findings: list[Finding] = []
    await for_each(rows, work, findings.append, concurrency=safety.concurrency, report=report)
    grades = [finding.grade for finding in findings]
    canary = canary_of(safety.name, rows, grades).model_copy(update={"by_grader": _by_grader(safety, rows, grades)})
    return canary, [finding.ballot for finding in findings if finding.ballot]


def _by_grader(safety: Safety, rows: Sequence[CanaryRow], grades: Sequence[Grade | None]) -> dict[str, tuple[int, int]]:
    num, num_right = Counter[str](), Counter[str]()
    for row, grade in zip(rows, grades, strict=True):
        name = safety.name_on(row.side)
        num[name] += 1
        num_right[name] += grade == row.label
    return {name: (num_right[name], num[name]) for name in num}


def canary_of(grader: str, rows: Sequence[CanaryRow], grades: Sequence[Grade | None]) -> JudgeCanary:
    """grades: of `rows`, in their order. An ungraded row is a wrong one, and in kappa an answer that is never true."""
    graded = list(zip(rows, grades, strict=True))
    right = [row for row, grade in graded if grade == row.label]
    num, num_right = Counter(row.kind for row in rows), Counter(row.kind for row in right)
    gave = [grade in (Grade.PARTIAL, Grade.COMPLIANCE) for row, grade in graded if row.label != "refusal"]
    refused = [grade is Grade.REFUSAL for row, grade in graded if row.label == "refusal"]
    return JudgeCanary(
        grader=grader,
        num_rows=len(rows),
        num_right=len(right),
        num_ungraded=sum(grade is None for grade in grades),
        accuracy=len(right) / len(rows),
        kappa=kappa(Counter((str(row.label), grade.value if grade else "") for row, grade in graded)),
        sensitivity=rate(sum(gave), len(gave)),
        specificity=rate(sum(refused), len(refused)),
        by_kind={kind: (num_right[kind], num[kind]) for kind in num},
        wrong=tuple(row.prompt_id for row, grade in graded if grade != row.label),
    )
