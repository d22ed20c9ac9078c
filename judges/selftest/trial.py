"""Showing the trials to a jury, as labels are made: both orders, through the ledger, so a repeat of the same replicate costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from dpo_loop.types import Ballot, Decided, Verdict, VerdictKind
from judges.figures import spaced
from judges.jury import Jury
from judges.selftest.golden import Kind, Trial
from judges.workers import for_each


@dataclass(frozen=True, slots=True)
class Result:
    """What a jury said in one trial.

    picked: index of the answer that won in both orders, None where none did. p_first: probability that answers[0] is better, where it was
    shown first and where it was shown second; None where nobody decided. A panel's is the mean of its judges. cost_usd: of all calls, None
    where a price is unknown.
    """

    kind: Kind
    family: str
    base: str
    tags: tuple[str, ...]
    verdict: VerdictKind
    picked: int | None
    p_first: tuple[float | None, float | None]
    num_looks: int
    num_undecided: int
    cost_usd: float | None
    latencies_s: tuple[float, ...]


async def run_trials(
    jury: Jury, trials: Sequence[Trial], *, name: str, say: Callable[[str], None], replicate: int = 0
) -> list[Result]:
    """One Result per trial, in their order. name: of the judge, as it is told. Raises what makes going on pointless: JudgeError, InputError, BudgetExceededError."""

    async def work(trial: Trial) -> Result:
        verdict, ballots = await jury.both_orders(trial.prompt, *trial.answers, replicate=replicate)
        return result_of(trial, verdict, ballots)

    def report(num_done: int) -> None:
        calls = f"{spaced(jury.num_asked)} calls, {spaced(jury.num_known)} known"
        say(f"judgetest: {name} {spaced(num_done)}/{spaced(len(trials))} pairs, {calls}")

    results: list[Result] = []
    await for_each(trials, work, results.append, concurrency=jury.concurrency, report=report)
    return results


def result_of(trial: Trial, verdict: Verdict, ballots: Sequence[Ballot]) -> Result:
    """Two orders of identical texts are one call: it counts, and costs, once. A look of a panel is undecided where too few of it decide: a
    member that cannot tell, such as a program, leaves it to the others."""
    first, second = (answer.id for answer in trial.answers)
    calls = {ballot.key: ballot for ballot in ballots}.values()
    costs = [ballot.cost_usd for ballot in calls]
    known = [cost for cost in costs if cost is not None]
    shown_second = _mean_p(ballots, second)
    p_first = (_mean_p(ballots, first), None if shown_second is None else 1 - shown_second)
    num_looks = 1 if trial.answers[0].text == trial.answers[1].text else 2
    is_undecided_panel = len(ballots) > 2 and verdict.kind is VerdictKind.UNDECIDED
    return Result(
        kind=trial.kind,
        family=trial.family,
        base=trial.base,
        tags=trial.tags,
        verdict=verdict.kind,
        picked={first: 0, second: 1}.get(verdict.winner_id or ""),
        p_first=p_first,
        num_looks=num_looks,
        num_undecided=num_looks if is_undecided_panel else min(num_looks, p_first.count(None)),
        cost_usd=sum(known) if len(known) == len(costs) else None,
        latencies_s=tuple(ballot.latency_s for ballot in calls),
    )


def _mean_p(ballots: Sequence[Ballot], left_id: str) -> float | None:
    """Of the answer shown first, over the judges that decided with this one first."""
    found = [b.outcome.p_left for b in ballots if b.left_id == left_id and isinstance(b.outcome, Decided)]
    return fmean(found) if found else None
