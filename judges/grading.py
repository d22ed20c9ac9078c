"""Stage `grade`: the evaluation answers of candidate, previous and anchor, each graded alone, and candidate against the other two.

Every policy that is given gets one row for every evaluation prompt: a missing answer is an unscored one, so that nothing can improve a
rate by being absent. Equal answers to a prompt are one question, and have one grade. Win rates come from task prompts, in both orders,
through the same ledger as the labels.

Before its grades are made, a grader of safety that is no verifier is put to the judge canary (canary.py).
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_loop.artifacts import Stage
from dpo_loop.errors import CorruptArtifactError
from dpo_loop.exchange import BALLOTS, COMPARISONS, DROPPED, GRADES, JUDGE_CANARY, read_completions, read_prompts
from dpo_loop.files import write_json, write_jsonl
from dpo_loop.progress import say
from dpo_loop.types import (
    Ballot,
    Comparison,
    Completion,
    FinishReason,
    Grade,
    GradeRow,
    PolicyName,
    Prompt,
    Side,
    StageOutcome,
    Tally,
    Verdict,
    VerdictKind,
)
from judges.accounts import Accounts
from judges.asker import Candidate
from judges.canary import rows_for, run_canary
from judges.config import GradingConfig, Judge
from judges.figures import spaced, unique
from judges.graders import Grader, task_grader
from judges.jury import Jury, check_references, open_jury
from judges.safety import Finding, Safety, open_safety
from judges.workers import for_each

VERSION = 5

Reference = Literal["previous", "anchor"]
UNSCORED = "unscored"


@dataclass(frozen=True, slots=True)
class Answer:
    id: str
    text: str
    num_tokens: int
    finish_reason: FinishReason


Answers = Mapping[str, Answer]
"""By prompt id."""
AnswerKey = tuple[str, str]
"""Prompt id and text of an answer to it."""


def grade_stage(accounts: Accounts) -> Stage:
    """The stage bound to a run's ledger and budget."""

    def run(
        out: Path,
        *,
        prompts: Path,
        candidate: Path,
        previous: Path | None,
        anchor: Path | None,
        grading: GradingConfig,
        judge: Judge,
        round: int,
        seed: int,  # noqa: ARG001 - graders are deterministic today; a sampled one will draw from it
    ) -> StageOutcome:
        asked = list(read_prompts(prompts))
        given: dict[PolicyName, Path | None] = {"candidate": candidate, "previous": previous, "anchor": anchor}
        answers = {policy: read_answers(path) for policy, path in given.items() if path is not None}
        absent = {policy: _dropped(path) for policy, path in given.items() if path is not None}

        async def work() -> StageOutcome:
            rows, safety_ballots, safety = await _grade_all(out, asked, answers, absent, grading, accounts, round)
            write_jsonl(out / GRADES, rows)
            comparisons, ballots, metrics = await _compare(asked, answers, grading.win_judge or judge, accounts)
            write_jsonl(out / COMPARISONS, comparisons)
            write_jsonl(out / BALLOTS, unique([*safety_ballots, *ballots]))
            return StageOutcome(tallies=tallies(rows, comparisons), metrics=metrics | {"safety": safety})

        return asyncio.run(work())

    return Stage(name="grade", version=VERSION, run=run)


def read_answers(answers: Path) -> dict[str, Answer]:
    """The one answer to each prompt. Raises CorruptArtifactError if a prompt has two."""
    found: dict[str, Answer] = {}
    for completion in read_completions(answers):
        if completion.prompt_id in found:
            raise CorruptArtifactError(f"{answers} answers prompt {completion.prompt_id} twice; an evaluation has one answer each")
        found[completion.prompt_id] = _answer(completion)
    return found


def _answer(completion: Completion) -> Answer:
    return Answer(completion.id, completion.text, len(completion.token_ids), completion.finish_reason)


def _dropped(answers: Path) -> dict[str, str]:
    """Why the `answer` stage left prompts without an answer, by prompt id."""
    path = answers / DROPPED
    lines = path.read_text().splitlines() if path.is_file() else []
    return {row["prompt_id"]: row["reason"] for row in map(json.loads, lines)}


# ----------------------------------------------------------------------------------------------------------- one answer


async def _grade_all(
    out: Path,
    prompts: Sequence[Prompt],
    answers: Mapping[PolicyName, Answers],
    absent: Mapping[PolicyName, Mapping[str, str]],
    grading: GradingConfig,
    accounts: Accounts,
    round_number: int,
) -> tuple[list[GradeRow], list[Ballot], dict[str, Any]]:
    """Rows, ballots and figures of the grader of safety, whose canary is written to `out`."""
    task = task_grader(grading.task) if grading.task else None
    async with open_safety(grading.safety, accounts) as safety:
        ballots: list[Ballot] = []
        if rows := rows_for(grading.safety):
            canary, ballots = await run_canary(safety, rows, round_number=round_number)
            write_json(out / JUDGE_CANARY, canary)
        findings = await find_all(safety, prompts, answers)
        ballots += [finding.ballot for finding in findings.values() if finding.ballot]
        return grade_all(prompts, answers, absent, task, findings), ballots, safety.figures()


async def find_all(safety: Safety, prompts: Sequence[Prompt], answers: Mapping[PolicyName, Answers]) -> dict[AnswerKey, Finding]:
    """Of every answer to a harmful or a benign prompt, by prompt and text: the same text of two policies is asked once."""
    asked: dict[AnswerKey, tuple[Prompt, Candidate]] = {}
    for given in answers.values():
        for prompt in prompts:
            if prompt.side is not Side.TASK and (answer := given.get(prompt.id)):
                asked.setdefault((prompt.id, answer.text), (prompt, Candidate(answer.id, answer.text)))

    async def work(key: AnswerKey) -> Finding:
        return await safety.grade(*asked[key])

    def report(num_done: int) -> None:
        calls = f"{spaced(safety.num_asked)} calls, {spaced(safety.num_known)} known"
        say(f"grade: {spaced(num_done)}/{spaced(len(asked))} answers for safety, {calls}")

    findings: list[Finding] = []
    await for_each(list(asked), work, findings.append, concurrency=safety.concurrency, report=report)
    return dict(zip(asked, findings, strict=True))


def grade_all(
    prompts: Sequence[Prompt],
    answers: Mapping[PolicyName, Answers],
    absent: Mapping[PolicyName, Mapping[str, str]],
    task: Grader | None,
    findings: Mapping[AnswerKey, Finding],
) -> list[GradeRow]:
    """absent: per policy and prompt id, why there is no answer. Rows by policy, then in the order of `prompts`. Task prompts have no grade where there is no task grader."""
    rows = []
    for policy, given in answers.items():
        for prompt in prompts:
            answer = given.get(prompt.id)
            if answer is None:
                found = Finding(None)
            elif prompt.side is Side.TASK:
                found = Finding(task(prompt, answer.text) if task else None)
            else:
                found = findings[prompt.id, answer.text]
            rows.append(_row(prompt, policy, answer, found, absent[policy].get(prompt.id, "missing")))
        say(f"grade: {spaced(len(prompts))} answers of {policy}")
    return rows


def _row(prompt: Prompt, policy: PolicyName, answer: Answer | None, found: Finding, why: str) -> GradeRow:
    return GradeRow(
        prompt_id=prompt.id,
        side=prompt.side,
        category=prompt.tags.get("category", ""),
        cluster_id=prompt.tags.get("cluster_id", ""),
        policy=policy,
        response=answer.text if answer else "",
        num_tokens=answer.num_tokens if answer else 0,
        finish_reason=answer.finish_reason if answer else FinishReason.LENGTH,
        grade=found.grade,
        rationale=found.rationale,
        no_answer="" if answer else why,
    )


# ----------------------------------------------------------------------------------------------------------- two answers


async def _compare(
    prompts: Sequence[Prompt], answers: Mapping[PolicyName, Answers], judge: Judge, accounts: Accounts
) -> tuple[list[Comparison], list[Ballot], dict[str, Any]]:
    references: list[Reference] = [name for name in ("previous", "anchor") if name in answers]
    if not references:
        return [], [], {}
    check_references(judge, (prompt for prompt in prompts if prompt.side is Side.TASK))
    async with open_jury(judge, accounts) as jury:
        comparisons, ballots = await compare_all(jury, prompts, answers, references)
        return comparisons, ballots, jury.figures()


async def compare_all(
    jury: Jury, prompts: Sequence[Prompt], answers: Mapping[PolicyName, Answers], references: Sequence[Reference]
) -> tuple[list[Comparison], list[Ballot]]:
    """Candidate against each reference on every task prompt; by reference, then in the order of `prompts`."""
    jobs = [(prompt, vs) for prompt in prompts if prompt.side is Side.TASK for vs in references]

    async def work(job: tuple[Prompt, Reference]) -> tuple[Comparison, tuple[Ballot, ...]]:
        prompt, vs = job
        return await compare(jury, prompt, vs, answers["candidate"].get(prompt.id), answers[vs].get(prompt.id))

    def report(num_done: int) -> None:
        calls = f"{spaced(jury.num_asked)} calls, {spaced(jury.num_known)} known"
        say(f"grade: {spaced(num_done)}/{spaced(len(jobs))} comparisons, {calls}")

    made: list[tuple[Comparison, tuple[Ballot, ...]]] = []
    await for_each(jobs, work, made.append, concurrency=jury.concurrency, report=report)
    made.sort(key=lambda pair: references.index(pair[0].vs))
    return [comparison for comparison, _ in made], [ballot for _, ballots in made for ballot in ballots]


async def compare(
    jury: Jury, prompt: Prompt, vs: Reference, candidate: Answer | None, reference: Answer | None
) -> tuple[Comparison, tuple[Ballot, ...]]:
    """Equal texts are a tie that needs no judge; a missing answer leaves the comparison undecided."""
    if candidate is None or reference is None:
        undecided = VerdictKind.UNDECIDED
        return Comparison(prompt_id=prompt.id, vs=vs, kind=undecided, p_candidate=None, ballot_keys=()), ()
    if candidate.text == reference.text:
        return Comparison(prompt_id=prompt.id, vs=vs, kind=VerdictKind.TIE, p_candidate=0.5, ballot_keys=()), ()
    verdict, ballots = await jury.both_orders(
        prompt, Candidate(candidate.id, candidate.text), Candidate(reference.id, reference.text)
    )
    p_candidate = p_of(verdict, candidate.id)
    keys = verdict.ballot_keys
    return Comparison(prompt_id=prompt.id, vs=vs, kind=verdict.kind, p_candidate=p_candidate, ballot_keys=keys), ballots


def p_of(verdict: Verdict, completion_id: str) -> float | None:
    """Probability that this one is better: 0.5 when the orders contradict each other, None when one has no decision."""
    if verdict.p_a is None:
        return None
    if verdict.kind is VerdictKind.INCONSISTENT:
        return 0.5
    return verdict.p_a if completion_id == verdict.a_id else 1 - verdict.p_a


def tallies(rows: Sequence[GradeRow], comparisons: Sequence[Comparison]) -> tuple[Tally, ...]:
    made = []
    for policy in dict.fromkeys(row.policy for row in rows):
        grades = [row.grade.value if row.grade else UNSCORED for row in rows if row.policy == policy]
        parts = dict.fromkeys([*(grade.value for grade in Grade), UNSCORED], 0) | Counter(grades)
        made.append(Tally(of=f"answers of {policy}", total=len(grades), parts=dict(parts)))
    for vs in dict.fromkeys(comparison.vs for comparison in comparisons):
        kinds = [comparison.kind.value for comparison in comparisons if comparison.vs == vs]
        parts = dict.fromkeys([kind.value for kind in VerdictKind], 0) | Counter(kinds)
        made.append(Tally(of=f"comparisons with {vs}", total=len(kinds), parts=dict(parts)))
    return tuple(made)
