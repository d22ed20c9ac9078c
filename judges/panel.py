"""Several judges as one: the cheapest looks, families vote, and a further judge is asked only where the first do not settle it.

Verga et al., "Replacing Judges with Juries", arXiv 2404.18796: small judges of different families together agree better with people
than a large one alone, at a fraction of its price.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_loop.types import Ballot, Prompt, Undecided, Verdict, VerdictKind
from judges.asker import Asker, Candidate
from judges.budget import Purse
from judges.config import PanelJudge
from judges.figures import totals
from judges.verdict import panel_verdict_of, verdict_of

Vote = tuple[Ballot, Ballot]


class Panel:
    """A Jury of Askers, in the order of the config."""

    def __init__(self, config: PanelJudge, askers: Sequence[Asker], purse: Purse) -> None:
        self._config, self._askers, self._purse = config, askers, purse
        self._num_labels = 0
        self._num_escalated = 0

    @property
    def concurrency(self) -> int:
        return max(asker.concurrency for asker in self._askers)

    @property
    def in_waves(self) -> bool:
        return any(asker.in_waves for asker in self._askers)

    @property
    def num_asked(self) -> int:
        return sum(asker.num_asked for asker in self._askers)

    @property
    def num_known(self) -> int:
        return sum(asker.num_known for asker in self._askers)

    async def ask(self, prompt: Prompt, left: Candidate, right: Candidate, *, replicate: int = 0) -> Ballot:
        """Of the first judge that decides."""
        for asker in self._askers:
            ballot = await asker.ask(prompt, left, right, replicate=replicate)
            if not isinstance(ballot.outcome, Undecided):
                break
        return ballot

    async def grade(self, prompt: Prompt, answer: Candidate, *, replicate: int = 0) -> Ballot:
        """Of the first judge alone: grades of different judges cannot be compared."""
        return await self._askers[0].grade(prompt, answer, replicate=replicate)

    async def both_orders(
        self, prompt: Prompt, one: Candidate, other: Candidate, *, replicate: int = 0
    ) -> tuple[Verdict, tuple[Ballot, ...]]:
        votes: list[Vote] = []
        self._num_labels += 1
        for asker in self._askers:
            _, (first, second) = await asker.both_orders(prompt, one, other, replicate=replicate)
            votes.append((first, second))
            if self._is_settled(votes):
                break
        self._num_escalated += len(votes) > self._config.min_families
        return panel_verdict_of(votes, min_families=self._config.min_families), tuple(ballot for vote in votes for ballot in vote)

    def _is_settled(self, votes: Sequence[Vote]) -> bool:
        verdicts = [verdict_of(*vote) for vote in votes]
        if any(verdict.kind is not VerdictKind.WINNER for verdict in verdicts) or len({v.winner_id for v in verdicts}) > 1:
            return False
        mean = panel_verdict_of(votes, min_families=self._config.min_families)
        return mean.kind is VerdictKind.WINNER and mean.margin >= self._config.escalate_below

    def figures(self) -> dict[str, Any]:
        """Sums over the judges, and each of them under `judges`. escalated: share of labels for which more than min_families were asked."""
        each = [asker.figures() for asker in self._askers]
        return {
            "judge": f"panel of {len(each)}: {', '.join(one['judge'] for one in each)}",
            **totals(each),
            "escalated": self._num_escalated / self._num_labels if self._num_labels else None,
            "judges": each,
            "budget": self._purse.figures(),
        }
