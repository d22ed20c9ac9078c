"""The evaluation as the page looks at it: every prompt with the answers of all policies and what the judge said when it compared them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from dpo_loop.types import Comparison, GradeRow, PolicyName, Prompt, Side, VerdictKind

POLICIES: tuple[PolicyName, ...] = ("anchor", "previous", "candidate")
REFERENCES: tuple[PolicyName, ...] = ("previous", "anchor")
NEVER_SHOWN = frozenset({"S4", "S9"})
"""Categories (child exploitation, weapons) whose answers are in no page."""
_CODE = re.compile(r"(?<![a-z0-9])s[\s_-]*0*(\d+)")
Change = Literal["worse", "better", "worse_than_anchor", "better_than_anchor", "bad", "reworded", "same", "good", "ungraded"]
"""worse, better: than the previous policy, the one that the candidate would replace; …_than_anchor: than the anchor alone."""

_NEWLY = {Side.TASK: "newly failing", Side.HARMFUL: "newly harmful", Side.BENIGN: "newly over-refused"}
_NO_LONGER = {Side.TASK: "newly passing", Side.HARMFUL: "no longer harmful", Side.BENIGN: "no longer refused"}
_AS_ASKED = {Side.TASK: "passed", Side.HARMFUL: "refused", Side.BENIGN: "answered"}
_NOT_AS_ASKED = {Side.TASK: "not passed", Side.HARMFUL: "not refused", Side.BENIGN: "not answered"}


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt. rows: by policy, the candidate's always among them. is_graded False: nothing grades such prompts, they are only compared."""

    prompt: Prompt
    rows: Mapping[PolicyName, GradeRow]
    comparisons: Mapping[str, Comparison]
    is_graded: bool

    @property
    def side(self) -> Side:
        return self.prompt.side

    @property
    def candidate(self) -> GradeRow:
        return self.rows["candidate"]

    @property
    def is_sealed(self) -> bool:
        """Counted, and never shown: a prompt that was seen can be tuned for."""
        return self.prompt.tags.get("sealed") == "true"

    @property
    def is_never_shown(self) -> bool:
        """Whoever calls it so: a row of any policy, or any tag of the prompt, however the code is written (`S4`, `s4`, `S04: CSE`, `S1,S4`)."""
        named = (*(row.category for row in self.rows.values()), *self.prompt.tags.values())
        return any(hazard_codes(name) & NEVER_SHOWN for name in named)

    def is_bad(self, policy: PolicyName) -> bool:
        return self.is_graded and self.rows[policy].is_bad


def hazard_codes(category: str) -> frozenset[str]:
    """The MLCommons codes that a category's name holds, as `S4`."""
    folded = unicodedata.normalize("NFKC", category).casefold()
    return frozenset(f"S{int(number)}" for number in _CODE.findall(folded))


def cases_of(prompts: Iterable[Prompt], rows: Iterable[GradeRow], comparisons: Iterable[Comparison] = ()) -> list[Case]:
    """In the order of the prompts; those without an answer of the candidate are left out. An anchor that is the previous policy is left out too: where
    all its answers are the previous policy's, they are looked at once."""
    of_prompt: dict[str, dict[PolicyName, GradeRow]] = {}
    compared: dict[str, dict[str, Comparison]] = {}
    tasks_are_graded = False
    for row in rows:
        of_prompt.setdefault(row.prompt_id, {})[row.policy] = row
        tasks_are_graded |= row.side is Side.TASK and row.grade is not None
    for comparison in comparisons:
        compared.setdefault(comparison.prompt_id, {})[comparison.vs] = comparison
    cases = [
        Case(prompt, found, compared.get(prompt.id, {}), prompt.side is not Side.TASK or tasks_are_graded)
        for prompt in prompts
        if "candidate" in (found := of_prompt.get(prompt.id, {}))
    ]
    return [_without_anchor(case) for case in cases] if all(_anchor_is_previous(case) for case in cases) else cases


def _anchor_is_previous(case: Case) -> bool:
    before, anchor = case.rows.get("previous"), case.rows.get("anchor")
    return before is not None and anchor is not None and anchor.model_copy(update={"policy": "previous"}) == before


def _without_anchor(case: Case) -> Case:
    return replace(
        case,
        rows={name: row for name, row in case.rows.items() if name != "anchor"},
        comparisons={vs: comparison for vs, comparison in case.comparisons.items() if vs != "anchor"},
    )


def change_of(case: Case) -> tuple[Change, str]:
    """What the candidate changed against the previous policy and, where that is nothing, against the anchor; the same in words. Of the candidate
    alone (round 0): how it did."""
    references = [name for name in REFERENCES if name in case.rows]
    if not references:
        return _alone(case)
    differing = [name for name in references if case.is_bad(name) != case.is_bad("candidate")]
    if differing:
        bad = case.is_bad("candidate")
        word = (_NEWLY if bad else _NO_LONGER)[case.side]
        return _kind(bad=bad, against=differing, references=references), f"{word} against {_listed(differing)}"
    if not case.is_graded and (judged := _compared(case, references)) is not None:
        return judged
    if case.rows[references[0]].response != case.candidate.response:
        return "reworded", "other words, same grade" if case.is_graded else "other words"
    return "same", "unchanged"


def _alone(case: Case) -> tuple[Change, str]:
    if not case.is_graded:
        return "ungraded", "not graded"
    return ("bad", _NOT_AS_ASKED[case.side]) if case.is_bad("candidate") else ("good", _AS_ASKED[case.side])


def _kind(*, bad: bool, against: Sequence[str], references: Sequence[str]) -> Change:
    if references[0] in against:
        return "worse" if bad else "better"
    return "worse_than_anchor" if bad else "better_than_anchor"


def _compared(case: Case, references: Sequence[str]) -> tuple[Change, str] | None:
    winners = {vs: winner_of(comparison) for vs, comparison in case.comparisons.items()}
    lost, won = [vs for vs in REFERENCES if winners.get(vs) == vs], [vs for vs in REFERENCES if winners.get(vs) == "candidate"]
    if not lost and not won:
        return None
    told = [f"{word} than {_listed(names)}" for word, names in (("better", won), ("worse", lost)) if names]
    bad = references[0] in lost or (references[0] not in won and bool(lost))
    return _kind(bad=bad, against=[*lost, *won], references=references), f"judged {', '.join(told)}"


def winner_of(comparison: Comparison) -> str:
    """`candidate`, the reference's name, or in one word why neither won."""
    p = comparison.p_candidate
    if comparison.kind is VerdictKind.WINNER and p is not None and p != 0.5:
        return "candidate" if p > 0.5 else comparison.vs
    return comparison.kind.value if comparison.kind is not VerdictKind.WINNER else VerdictKind.TIE.value


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names)
