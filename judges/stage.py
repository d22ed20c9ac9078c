"""Stage `judge`: K answers per prompt → the best and the worst, and a verdict between them from both orders.

For each prompt: equal texts are one candidate; a randomised knockout picks best and worst (knockout.py); the verdict between
these two is the only thing a label may come from. All randomness follows from (seed, prompt id), and every call goes through the
ledger, so a stage that was killed ends with the same judgements and pays for nothing twice.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage
from dpo_loop.errors import CorruptArtifactError
from dpo_loop.exchange import BALLOTS, JUDGEMENTS, read_completions, read_prompts
from dpo_loop.files import write_jsonl
from dpo_loop.progress import say
from dpo_loop.types import Ballot, Decided, FinishReason, Prompt, PromptJudgement, StageOutcome, Tally, VerdictKind, content_id
from judges.asker import Candidate
from judges.budget import Accounts
from judges.config import Judge
from judges.jury import Jury, open_jury
from judges.knockout import best_and_worst
from judges.workers import for_each

VERSION = 3
"""Also bumped when a rubric or the layout of a request changes, which the stage's inputs do not show."""

NOTHING_TO_COMPARE = "nothing_to_compare"


@dataclass(frozen=True, slots=True)
class Judged:
    judgement: PromptJudgement
    final: tuple[Ballot, ...]
    """The ballots of the verdict, one in each order; empty where there was nothing to compare."""
    selecting: tuple[Ballot, ...]
    """The ballots of the knockout."""


def judge_stage(accounts: Accounts) -> Stage:
    """The stage bound to a run's ledger and budget, which change what is paid and not what is published."""

    def run(out: Path, *, prompts: Path, completions: Path, judge: Judge, seed: int) -> StageOutcome:
        return asyncio.run(_run(out, prompts=prompts, completions=completions, judge=judge, seed=seed, accounts=accounts))

    return Stage(name="judge", version=VERSION, run=run)


async def _run(out: Path, *, prompts: Path, completions: Path, judge: Judge, seed: int, accounts: Accounts) -> StageOutcome:
    asked = list(read_prompts(prompts))
    candidates = _candidates(completions, asked)
    async with open_jury(judge, accounts) as jury:
        judged = await judge_prompts(jury, asked, candidates, seed=seed)
        calls = jury.figures()
    write_jsonl(out / JUDGEMENTS, (item.judgement for item in judged))
    write_jsonl(out / BALLOTS, unique(ballot for item in judged for ballot in (*item.selecting, *item.final)))
    return StageOutcome(tallies=(tally(judged),), metrics=figures(judged) | calls)


def _candidates(completions: Path, prompts: Sequence[Prompt]) -> dict[str, list[Candidate]]:
    """Per prompt id, the answers in order of k, without their token ids. Raises CorruptArtifactError for an unknown prompt."""
    found: dict[str, list[Candidate]] = {prompt.id: [] for prompt in prompts}
    for prompt_id, group in groupby(read_completions(completions), key=lambda completion: completion.prompt_id):
        if prompt_id not in found:
            raise CorruptArtifactError(f"{completions} answers prompt {prompt_id}, which is not among the round's prompts")
        found[prompt_id] += [Candidate(c.id, c.text, is_whole=c.finish_reason is FinishReason.STOP) for c in group]
    return found


async def judge_prompts(
    jury: Jury, prompts: Sequence[Prompt], candidates: dict[str, list[Candidate]], *, seed: int
) -> list[Judged]:
    """One Judged per prompt, in the order of `prompts`; prompts without an entry in `candidates` have nothing to compare."""
    seen: Counter[str] = Counter()

    async def work(prompt: Prompt) -> Judged:
        judged = await judge_prompt(jury, prompt, candidates.get(prompt.id, []), seed=seed)
        seen[outcome_of(judged)] += 1
        return judged

    def report(num_done: int) -> None:
        calls = f"{spaced(jury.num_asked)} calls, {spaced(jury.num_known)} known"
        say(f"judge: {spaced(num_done)}/{spaced(len(prompts))} prompts, {calls}, {spaced(seen['winner'])} with a winner")

    return await for_each(prompts, work, concurrency=jury.concurrency, report=report)


async def judge_prompt(jury: Jury, prompt: Prompt, answers: Sequence[Candidate], *, seed: int) -> Judged:
    by_id = {answer.id: answer for answer in distinct(answers)}
    if len(by_id) < 2:
        why = "no answer" if not answers else f"all {len(answers)} answers are the same"
        judgement = PromptJudgement(prompt_id=prompt.id, best_id=None, worst_id=None, verdict=None, why=why)
        return Judged(judgement, (), ())
    selecting: list[Ballot] = []

    async def match(first: str, second: str) -> float | None:
        ballot = await jury.ask(prompt, by_id[first], by_id[second])
        selecting.append(ballot)
        return ballot.outcome.p_left if isinstance(ballot.outcome, Decided) else None

    rng = random.Random(content_id("knockout", seed, prompt.id))
    best, worst = await best_and_worst(list(by_id), rng, match)
    verdict, final = await jury.both_orders(prompt, by_id[best], by_id[worst])
    return Judged(PromptJudgement(prompt_id=prompt.id, best_id=best, worst_id=worst, verdict=verdict), final, tuple(selecting))


def distinct(answers: Sequence[Candidate]) -> list[Candidate]:
    """One answer for each text: the first that ended by itself, since a cut off one makes no pair, else the first."""
    twins: dict[str, list[Candidate]] = {}
    for answer in answers:
        twins.setdefault(answer.text.strip(), []).append(answer)
    return [next((answer for answer in same if answer.is_whole), same[0]) for same in twins.values()]


# ------------------------------------------------------------------------------------------------------------------ figures


def outcome_of(judged: Judged) -> str:
    verdict = judged.judgement.verdict
    return NOTHING_TO_COMPARE if verdict is None else verdict.kind.value


def tally(judged: Sequence[Judged]) -> Tally:
    parts = dict.fromkeys([*VerdictKind, NOTHING_TO_COMPARE], 0) | Counter(outcome_of(item) for item in judged)
    return Tally(of="prompts", total=len(judged), parts={str(name): count for name, count in parts.items()})


def figures(judged: Sequence[Judged]) -> dict[str, Any]:
    """Of the confirming ballots: a knockout's matches are shown in one order only and would say nothing about the judge.

    yield: winners per prompt. consistency: share of pairs, decided in both orders, whose orders do not contradict each other.
    first_position_win_rate: of decided ballots that name a winner, how many name the answer shown first; 0.5 is unbiased.
    tie_rate: ties among pairs decided in both orders.
    """
    kinds = Counter(outcome_of(item) for item in judged)
    decided = sum(kinds[kind] for kind in VerdictKind if kind is not VerdictKind.UNDECIDED)
    p_first = [b.outcome.p_left for item in judged for b in item.final if isinstance(b.outcome, Decided)]
    winners = [p for p in p_first if p != 0.5]
    return {
        "yield": rate(kinds[VerdictKind.WINNER], len(judged)),
        "consistency": rate(decided - kinds[VerdictKind.INCONSISTENT], decided),
        "first_position_win_rate": rate(sum(p > 0.5 for p in winners), len(winners)),
        "tie_rate": rate(kinds[VerdictKind.TIE], decided),
    }


def rate(num: int, of: int) -> float | None:
    return None if of == 0 else num / of


def unique(ballots: Any) -> list[Ballot]:
    """Each call once, in the order of first use: a final pair may have met in the knockout."""
    return list({(ballot.key, ballot.left_id, ballot.right_id): ballot for ballot in ballots}.values())


def spaced(number: int) -> str:
    return f"{number:,}".replace(",", " ")
