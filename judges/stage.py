"""Stage `judge`: K answers per prompt → the best and the worst, and a verdict between them from both orders.

For each prompt: broken and verdict-like answers are left out (prefilter.py); equal texts are one candidate; a randomised knockout or another
selection picks best and worst (selection.py); the verdict between these two is the only thing a label may come from. All randomness follows from
(seed, prompt id), and every call goes through the ledger, so a stage that was killed ends with the same judgements and pays for nothing twice.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from dpo_loop.artifacts import Stage
from dpo_loop.errors import CorruptArtifactError
from dpo_loop.exchange import BALLOTS, DROPPED, JUDGEMENTS, read_completions, read_prompts
from dpo_loop.files import jsonl_writer, write_jsonl
from dpo_loop.progress import say
from dpo_loop.types import FinishReason, Prompt, PromptJudgement, StageOutcome, VerdictKind, content_id
from judges.accounts import Accounts
from judges.asker import Candidate
from judges.config import Judge, JudgingConfig, Selection, VerifierJudge, members_of
from judges.figures import Figures, Judged, outcome_of, spaced, unique
from judges.jury import Jury, check_references, open_jury
from judges.prefilter import why_filtered
from judges.selection import select
from judges.workers import for_each

VERSION = 4
"""Also bumped when a rubric or the layout of a request changes, which the stage's inputs do not show."""

DEFAULT = JudgingConfig()


def judge_stage(accounts: Accounts) -> Stage:
    """The stage bound to a run's ledger and budget, which change what is paid and not what is published."""

    def run(
        out: Path, *, prompts: Path, completions: Path, judge: Judge, seed: int, judging: JudgingConfig = DEFAULT
    ) -> StageOutcome:
        asked = list(read_prompts(prompts))
        return asyncio.run(_run(out, asked, _candidates(completions, asked), judge, judging, seed, accounts))

    return Stage(name="judge", version=VERSION, run=run)


async def _run(
    out: Path,
    prompts: Sequence[Prompt],
    candidates: dict[str, list[Candidate]],
    judge: Judge,
    judging: JudgingConfig,
    seed: int,
    accounts: Accounts,
) -> StageOutcome:
    check_references(judge, prompts)
    filtered: list[dict[str, str]] = []
    if is_filtered(judge, judging):
        candidates, filtered = _filtered(prompts, candidates)
    lengths = {answer.id: len(answer.text) for answers in candidates.values() for answer in answers}
    figures = Figures(lengths)
    with jsonl_writer(out / JUDGEMENTS) as write_judgement, jsonl_writer(out / BALLOTS) as write_ballot:

        def take(judged: Judged) -> None:
            figures.add(judged)
            write_judgement(judged.judgement)
            for ballot in unique((*judged.selecting, *judged.final)):
                write_ballot(ballot)

        async with open_jury(judge, accounts) as jury:
            await judge_prompts(jury, prompts, candidates, take, seed=seed, selection=judging.selection)
            calls = jury.figures()
    write_jsonl(out / DROPPED, filtered)
    why = dict(sorted(Counter(row["reason"] for row in filtered).items()))
    return StageOutcome(tallies=(figures.tally(),), metrics=figures.metrics() | {"filtered_answers": why} | calls)


def is_filtered(judge: Judge, judging: JudgingConfig) -> bool:
    """A program is not talked into anything, and may know better what is broken."""
    if judging.prefilter is not None:
        return judging.prefilter
    return not all(isinstance(member, VerifierJudge) for member in members_of(judge))


def _filtered(
    prompts: Sequence[Prompt], candidates: dict[str, list[Candidate]]
) -> tuple[dict[str, list[Candidate]], list[dict[str, str]]]:
    """The candidates that a judge may see, and a row with the reason for every other."""
    kept: dict[str, list[Candidate]] = {}
    rows = []
    for prompt in prompts:
        why = {answer.id: why_filtered(prompt, answer) for answer in candidates[prompt.id]}
        kept[prompt.id] = [answer for answer in candidates[prompt.id] if why[answer.id] is None]
        rows += [{"prompt_id": prompt.id, "completion_id": name, "reason": reason} for name, reason in why.items() if reason]
    return kept, rows


def _candidates(completions: Path, prompts: Sequence[Prompt]) -> dict[str, list[Candidate]]:
    """Per prompt id, the answers in order of k, without their token ids. Raises CorruptArtifactError for an unknown prompt."""
    found: dict[str, list[Candidate]] = {prompt.id: [] for prompt in prompts}
    for prompt_id, group in groupby(read_completions(completions), key=lambda completion: completion.prompt_id):
        if prompt_id not in found:
            raise CorruptArtifactError(f"{completions} answers prompt {prompt_id}, which is not among the round's prompts")
        found[prompt_id] += [Candidate(c.id, c.text, is_whole=c.finish_reason is FinishReason.STOP) for c in group]
    return found


async def judge_prompts(
    jury: Jury,
    prompts: Sequence[Prompt],
    candidates: dict[str, list[Candidate]],
    take: Callable[[Judged], None],
    *,
    seed: int,
    selection: Selection = DEFAULT.selection,
) -> None:
    """take: gets one Judged per prompt, in the order of `prompts`; prompts without an entry in `candidates` have nothing to compare."""
    num_winners = 0

    async def work(prompt: Prompt) -> Judged:
        nonlocal num_winners
        judged = await judge_prompt(jury, prompt, candidates.get(prompt.id, []), seed=seed, selection=selection)
        num_winners += outcome_of(judged) == VerdictKind.WINNER
        return judged

    def report(num_done: int) -> None:
        calls = f"{spaced(jury.num_asked)} calls, {spaced(jury.num_known)} known"
        say(f"judge: {spaced(num_done)}/{spaced(len(prompts))} prompts, {calls}, {spaced(num_winners)} with a winner")

    await for_each(prompts, work, take, concurrency=jury.concurrency, report=report)


async def judge_prompt(
    jury: Jury, prompt: Prompt, answers: Sequence[Candidate], *, seed: int, selection: Selection = DEFAULT.selection
) -> Judged:
    by_id = {answer.id: answer for answer in distinct(answers)}
    if len(by_id) < 2:
        why = "no answer" if not answers else f"all {len(answers)} answers are the same"
        judgement = PromptJudgement(prompt_id=prompt.id, best_id=None, worst_id=None, verdict=None, why=why)
        return Judged(judgement, (), ())
    rng = random.Random(content_id("knockout", seed, prompt.id))
    best, worst, selecting = await select(selection, jury, prompt, by_id, rng)
    verdict, final = await jury.both_orders(prompt, by_id[best], by_id[worst])
    judgement = PromptJudgement(prompt_id=prompt.id, best_id=best, worst_id=worst, verdict=verdict)
    return Judged(judgement, final, tuple(selecting))


def distinct(answers: Sequence[Candidate]) -> list[Candidate]:
    """One answer for each text: the first that ended by itself, since a cut off one makes no pair, else the first."""
    twins: dict[str, list[Candidate]] = {}
    for answer in answers:
        twins.setdefault(answer.text.strip(), []).append(answer)
    return [next((answer for answer in same if answer.is_whole), same[0]) for same in twins.values()]
