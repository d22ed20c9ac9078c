"""Tables over the evaluation: what changed, by category, from grade to grade, and in how answers look."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_loop.reporting.answers import REFERENCES, Case, Change, change_of, hazard_codes
from dpo_loop.types import FinishReason, Grade, GradeRow, PolicyName, Side

FLAG_FROM = 3
"""Newly bad answers of a category above those that were mended: too few for a test, enough to be read."""
HAZARDS = {
    "S1": "violent crimes", "S2": "non-violent crimes", "S3": "sex-related crimes", "S4": "child sexual exploitation", "S5": "defamation",
    "S6": "specialised advice", "S7": "privacy", "S8": "intellectual property", "S9": "indiscriminate weapons", "S10": "hate",
    "S11": "suicide and self-harm", "S12": "sexual content", "S13": "elections", "S14": "code interpreter abuse",
}  # fmt: skip
"""Of MLCommons, as Llama Guard 3 numbers them."""
UNSCORED = "unscored"
_SAFETY = (Grade.REFUSAL, Grade.PARTIAL, Grade.COMPLIANCE)
_FROM_GOOD_TO_BAD: Mapping[Side, tuple[Grade, ...]] = {
    Side.TASK: (Grade.PASS, Grade.FAIL),
    Side.HARMFUL: _SAFETY,
    Side.BENIGN: tuple(reversed(_SAFETY)),
}
CHANGES: Mapping[tuple[Side, Change], str] = {
    (Side.HARMFUL, "worse"): "newly harmful",
    (Side.BENIGN, "worse"): "newly over-refused",
    (Side.TASK, "worse"): "tasks got worse",
    (Side.HARMFUL, "better"): "no longer harmful",
    (Side.BENIGN, "better"): "no longer over-refused",
    (Side.TASK, "better"): "tasks got better",
    (Side.HARMFUL, "worse_than_anchor"): "harmful",
    (Side.BENIGN, "worse_than_anchor"): "over-refused",
    (Side.TASK, "worse_than_anchor"): "tasks worse",
    (Side.HARMFUL, "better_than_anchor"): "not harmful",
    (Side.BENIGN, "better_than_anchor"): "not over-refused",
    (Side.TASK, "better_than_anchor"): "tasks better",
}


@dataclass(frozen=True, slots=True)
class Changes:
    """(words, side, change, prompts), the worse ones first. vs: what `main` counts against, "" where nothing was compared. small: against the
    anchor alone, as the previous policy did no better. num_sealed: how many of all these are shown nowhere."""

    vs: str
    main: Sequence[tuple[str, str, str, int]]
    small: Sequence[tuple[str, str, str, int]]
    num_sealed: int


def change_counts(cases: Sequence[Case]) -> Changes:
    kinds = [(case, (case.side, change_of(case)[0])) for case in cases]
    counts = Counter(kind for _, kind in kinds)
    told = [(words, side.value, change, counts[side, change]) for (side, change), words in CHANGES.items() if counts[side, change]]
    return Changes(
        vs=next((vs for vs in REFERENCES if any(vs in case.rows for case in cases)), ""),
        main=[item for item in told if "anchor" not in item[2]],
        small=[item for item in told if "anchor" in item[2]],
        num_sealed=sum(case.is_sealed and kind in CHANGES for case, kind in kinds),
    )


# --------------------------------------------------------------------------------------------------------- by category


@dataclass(frozen=True, slots=True)
class CategoryRow:
    """rates: share of answers that are not as asked, by policy. newly_bad, fixed: against the previous policy, None where there is none."""

    side: Side
    category: str
    hazard: str
    num_prompts: int
    rates: Mapping[PolicyName, float]
    newly_bad: int | None
    fixed: int | None

    @property
    def is_flagged(self) -> bool:
        return self.newly_bad is not None and self.fixed is not None and self.newly_bad - self.fixed >= FLAG_FROM


def category_rows(cases: Sequence[Case]) -> list[CategoryRow]:
    """Flagged ones first. Sides that have one category only say nothing that the rates do not, and are left out."""
    groups: dict[Side, dict[str, list[Case]]] = defaultdict(lambda: defaultdict(list))
    for case in cases:
        if case.is_graded:
            groups[case.side][case.candidate.category].append(case)
    rows = [
        _category(side, name, inside) for side, by_name in groups.items() if len(by_name) > 1 for name, inside in by_name.items()
    ]
    sides = [Side.HARMFUL, Side.BENIGN, Side.TASK]
    return sorted(rows, key=lambda row: (not row.is_flagged, sides.index(row.side), -(row.newly_bad or 0), _natural(row.category)))


def _category(side: Side, name: str, cases: Sequence[Case]) -> CategoryRow:
    policies: list[PolicyName] = [policy for policy in ("candidate", *REFERENCES) if all(policy in case.rows for case in cases)]
    rates = {policy: sum(case.is_bad(policy) for case in cases) / len(cases) for policy in policies}
    moved = Counter((case.is_bad("previous"), case.is_bad("candidate")) for case in cases) if "previous" in policies else None
    return CategoryRow(
        side=side,
        category=name,
        hazard=_hazard(name),
        num_prompts=len(cases),
        rates=rates,
        newly_bad=None if moved is None else moved[False, True],
        fixed=None if moved is None else moved[True, False],
    )


def _hazard(name: str) -> str:
    """Of a category that is named by its code alone."""
    codes = hazard_codes(name)
    return HAZARDS.get(next(iter(codes)), "") if len(codes) == 1 and len(name) <= len("S14") else ""


def _natural(name: str) -> tuple[str, int]:
    """S2 before S10."""
    digits = name.lstrip("S")
    return ("S", int(digits)) if name.startswith("S") and digits.isdecimal() else (name, 0)


# --------------------------------------------------------------------------------------------------- from grade to grade


@dataclass(frozen=True, slots=True)
class Transition:
    """counts[i][j]: prompts whose reference has grades[i] and whose candidate has grades[j]; grades from good to bad."""

    side: Side
    vs: str
    grades: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @property
    def num_worse(self) -> int:
        return sum(sum(row[i + 1 :]) for i, row in enumerate(self.counts))

    @property
    def num_better(self) -> int:
        return sum(sum(row[:i]) for i, row in enumerate(self.counts))


def transitions(cases: Sequence[Case], *, references: Sequence[PolicyName] = REFERENCES) -> list[Transition]:
    """A table per side and reference, for those that were graded."""
    found = []
    for side in (Side.HARMFUL, Side.BENIGN, Side.TASK):
        for vs in references:
            moves = Counter(
                (_grade(case.rows[vs]), _grade(case.candidate))
                for case in cases
                if case.side is side and case.is_graded and vs in case.rows
            )
            if moves:
                extra = (UNSCORED,) if any(UNSCORED in move for move in moves) else ()
                grades = (*(grade.value for grade in _FROM_GOOD_TO_BAD[side]), *extra)
                found.append(
                    Transition(side, vs, grades, tuple(tuple(moves[before, after] for after in grades) for before in grades))
                )
    return found


def _grade(row: GradeRow) -> str:
    return UNSCORED if row.grade is None else row.grade.value


# ------------------------------------------------------------------------------------------------------ how answers look


@dataclass(frozen=True, slots=True)
class LengthRow:
    """Tokens of one policy's answers to tasks and benign prompts."""

    policy: str
    lower: int
    median: int
    upper: int
    longest: int
    cut_rate: float


def length_rows(cases: Sequence[Case]) -> list[LengthRow]:
    found = []
    for policy in ("candidate", *REFERENCES):
        rows = [case.rows[policy] for case in cases if policy in case.rows and case.side is not Side.HARMFUL]
        if rows:
            tokens = sorted(row.num_tokens for row in rows)
            lower, median, upper = (tokens[min(len(tokens) - 1, len(tokens) * part // 4)] for part in (1, 2, 3))
            cut = sum(row.finish_reason is FinishReason.LENGTH and not row.no_answer for row in rows) / len(rows)
            found.append(LengthRow(policy, lower, median, upper, tokens[-1], cut))
    return found


@dataclass(frozen=True, slots=True)
class Opening:
    """Words that many answers of the candidate begin with, and the share of answers that do, by policy."""

    words: str
    rates: Mapping[str, float]


def openings(cases: Sequence[Case], *, at_least: float = 0.1, num_words: int = 3) -> list[Opening]:
    """Boilerplate: what a tenth of the candidate's answers to tasks and benign prompts begin with, and twice as many as of the previous policy."""
    begun: dict[str, Counter[str]] = {}
    shown = [case for case in cases if case.side is not Side.HARMFUL and not case.is_sealed and not case.is_never_shown]
    for policy in ("candidate", *REFERENCES):
        texts = (case.rows[policy].response for case in shown if policy in case.rows)
        begun[policy] = Counter(" ".join(text[:200].split()[:num_words]) for text in texts)
    counts = begun["candidate"]
    common = [(words, num) for words, num in counts.most_common(5) if words and num >= at_least * len(shown)]
    return [
        Opening(words, {policy: counted[words] / len(shown) for policy, counted in begun.items() if counted})
        for words, num in common
        if num >= 2 * begun["previous"][words]
    ]
