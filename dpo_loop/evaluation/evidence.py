"""What the gate looks at: the answers of all policies to the same prompts, paired by prompt, and the comparisons."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from dpo_loop.evaluation.rates import SIDE_OF_METRIC, Reference, WinRate, is_degenerate, result_of, tasks_are_graded, win_rates_of
from dpo_loop.types import CapabilityRow, Comparison, Grade, GradeRow, PolicyName, Prompt, Side

MOST_NAMED = 5


@dataclass(frozen=True, slots=True)
class Pairs:
    """Both policies on the same prompts. changes: +1 where the reference is good and the candidate bad, -1 the other way round, else 0;
    clusters: of each prompt, a name of its own where it stands alone."""

    changes: list[int]
    clusters: list[str]
    num_bad_candidate: int
    num_bad_reference: int
    num_partial: int


class Evidence:
    """rows: one per policy and prompt. prompts: the evaluation set, which says what ought to be there. capability: of each policy, where there are tasks."""

    def __init__(
        self,
        prompts: Iterable[Prompt],
        rows: Iterable[GradeRow],
        comparisons: Iterable[Comparison],
        *,
        alpha: float,
        capability: Mapping[PolicyName, Iterable[CapabilityRow]] | None = None,
    ) -> None:
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.rows = list(rows)
        self.comparisons = list(comparisons)
        self.capability = {policy: list(of_policy) for policy, of_policy in (capability or {}).items()}
        self.has_task_grades = tasks_are_graded(self.rows)
        self._wins = win_rates_of(self.comparisons, alpha=alpha)
        self._rows_of: dict[PolicyName, dict[str, GradeRow]] = {"candidate": {}, "previous": {}, "anchor": {}}
        for row in self.rows:
            self._rows_of[row.policy][row.prompt_id] = row
        self._clusters = {row.prompt_id: row.cluster_id for row in self.rows if row.cluster_id}
        self._categories = {row.prompt_id: row.category for row in self.rows if row.category}
        self._degenerate: dict[tuple[str, str], bool] = {}

    def named(self, ids: Collection[str]) -> str:
        """Some of these ids, for a reason that people read; a sealed prompt is counted and not named, since what is named is tuned for."""
        open_ids = sorted(id for id in ids if (prompt := self.prompts.get(id)) is None or prompt.tags.get("sealed") != "true")
        num_sealed, num_more = len(ids) - len(open_ids), max(0, len(open_ids) - MOST_NAMED)
        more = [f"{num_more} more"] if num_more else []
        sealed = [f"{num_sealed} sealed"] if num_sealed else []
        return " and ".join([part for part in (", ".join(open_ids[:MOST_NAMED]), *more, *sealed) if part])

    def ids_on(self, side: Side | None) -> list[str]:
        return [id for id, prompt in self.prompts.items() if side is None or prompt.side is side]

    def counts(self, metric: str) -> tuple[int, int]:
        """(bad answers of the candidate, prompts); a missing answer is bad. (0, 0) where the metric does not exist here."""
        ids = self._ids(metric)
        return sum(self._bad(metric, "candidate", id, absent=True) for id in ids), len(ids)

    def paired(self, metric: str, vs: Reference) -> Pairs:
        """The worst case for the candidate: its own missing or ungraded answers are bad, those of the reference are good."""
        ids = self._ids(metric)
        pairs = [(self._bad(metric, "candidate", id, absent=True), self._bad(metric, vs, id, absent=False)) for id in ids]
        return Pairs(
            changes=[int(mine) - int(theirs) for mine, theirs in pairs],
            clusters=[self._clusters.get(id, id) for id in ids],
            num_bad_candidate=sum(mine for mine, _ in pairs),
            num_bad_reference=sum(theirs for _, theirs in pairs),
            num_partial=sum((row := self._rows_of["candidate"].get(id)) is not None and row.grade is Grade.PARTIAL for id in ids),
        )

    def newly_bad(self, metric: str, vs: Reference) -> dict[str, tuple[int, list[str]]]:
        """By category, how many prompts it has, and those on which the candidate is bad and the reference was not."""
        found: dict[str, tuple[int, list[str]]] = {}
        for id in self._ids(metric):
            num, bad = found.get(self._categories.get(id, ""), (0, []))
            if self._bad(metric, "candidate", id, absent=True) and not self._bad(metric, vs, id, absent=False):
                bad = [*bad, id]
            found[self._categories.get(id, "")] = num + 1, bad
        return found

    def wins(self, vs: Reference) -> WinRate | None:
        return self._wins.get(vs)

    def scores(self, vs: Reference) -> list[tuple[float | None, float]]:
        """Of each comparison: 1 win, 0.5 tie, 0 loss, None undecided; and how many tokens the candidate's answer is longer."""
        values = {"win": 1.0, "tie": 0.5, "loss": 0.0, "undecided": None}
        mine, theirs = self._rows_of["candidate"], self._rows_of[vs]
        pairs = ((c, mine.get(c.prompt_id), theirs.get(c.prompt_id)) for c in self.comparisons if c.vs == vs)
        return [(values[result_of(c)], float(one.num_tokens - other.num_tokens)) for c, one, other in pairs if one and other]

    def _ids(self, metric: str) -> list[str]:
        if metric == "pass_rate" and not self.has_task_grades:
            return []
        return self.ids_on(SIDE_OF_METRIC.get(metric))

    def _bad(self, metric: str, policy: PolicyName, prompt_id: str, *, absent: bool) -> bool:
        row = self._rows_of[policy].get(prompt_id)
        if row is None or row.no_answer:
            return absent
        if metric != "degenerate_rate":
            return absent if row.grade is None else row.is_bad
        known = self._degenerate.get((policy, prompt_id))
        if known is None:
            known = self._degenerate[policy, prompt_id] = is_degenerate(row, self.prompts.get(prompt_id))
        return known
