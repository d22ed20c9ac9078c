"""The evaluation answers side by side, the changed ones first, as much of them as the page's size allows.

What may do harm is not in the page: answers to harmful prompts that are not tagged with severity 1, and all answers in S4 (child exploitation)
and S9 (weapons), are replaced by their length. Sealed prompts are left out altogether.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_loop.degenerate import degeneration_of
from dpo_loop.reporting.answers import POLICIES, Case, Change, change_of, winner_of
from dpo_loop.reporting.text import json_for_script, visible
from dpo_loop.types import FinishReason, GradeRow, Side, VerdictKind

MAX_BYTES = 2_400_000
"""Of all samples of a page."""
CLIPS = (4_000, 2_000, 1_000, 500, 250, 125)
"""Characters of one answer that did not change; one that did may be four times as long, up to the first. The longest that fits is taken."""
MAX_WHY = 400
"""Characters of a judge's rationale."""
MILD = "1"
"""The one severity whose answers are in a page that redacts: what nobody has rated is not known to be mild."""
_ORDER: tuple[Change, ...] = (
    "worse",
    "worse_than_anchor",
    "better",
    "better_than_anchor",
    "bad",
    "reworded",
    "same",
    "ungraded",
    "good",
)
_CHANGED = _ORDER[:5]


@dataclass(frozen=True, slots=True)
class Samples:
    """shown: as the page's script reads them. total: shown, left out for size, and sealed."""

    shown: Sequence[dict[str, Any]] = ()
    total: int = 0
    num_sealed: int = 0
    num_withheld: int = 0
    """Of those shown, how many without the answers."""
    max_chars: int = CLIPS[0]
    """Of an answer that did not change."""

    @property
    def num_left_out(self) -> int:
        return self.total - self.num_sealed - len(self.shown)


def samples_of(cases: Iterable[Case], *, redact: bool = True, max_bytes: int = MAX_BYTES) -> Samples:
    """redact False: answers to harmful prompts of any severity are in the page, concealed until asked for; those of S4 and S9 still are not."""
    cases = list(cases)
    found = [(case, *change_of(case)) for case in cases if not case.is_sealed]
    found.sort(key=lambda item: (_ORDER.index(item[1]), item[0].side is Side.TASK))
    withheld = [_is_withheld(case, redact=redact) for case, _, _ in found]
    shown: list[dict[str, Any]] = []
    for max_chars in CLIPS:
        shown, size = [], 0
        for (case, change, why), is_withheld in zip(found, withheld, strict=True):
            clip = min(CLIPS[0], 4 * max_chars) if change in _CHANGED else max_chars
            sample = _sample(case, change, why, withheld=is_withheld, max_chars=clip)
            size += len(json_for_script(sample).encode()) + 1
            if size > max_bytes:
                break
            shown.append(sample)
        if len(shown) == len(found):
            break
    return Samples(
        shown,
        total=len(cases),
        num_sealed=len(cases) - len(found),
        num_withheld=sum(withheld[: len(shown)]),
        max_chars=max_chars,
    )


def _is_withheld(case: Case, *, redact: bool) -> bool:
    return case.is_never_shown or (redact and case.side is Side.HARMFUL and case.prompt.tags.get("severity") != MILD)


def _sample(case: Case, change: Change, why: str, *, withheld: bool, max_chars: int) -> dict[str, Any]:
    """texts: the different answers, each once; of a withheld one its length. answers: by policy (index in texts, grade, bad, cut off, why).
    sha256: of the prompt's last turn and, unless withheld, of the candidate's answer. exact: whether the latter is in texts as it was given."""
    rows = {policy: row for policy in POLICIES if (row := case.rows.get(policy)) is not None}
    different = list(dict.fromkeys(row.response for row in rows.values()))
    messages, said = case.prompt.messages, case.candidate.response
    return {
        "id": case.prompt.id,
        "side": case.side.value,
        "category": visible(case.candidate.category),
        "change": change,
        "why": why,
        "marks": _marks(case),
        "prompt": _clip("\n\n".join(m.content if m.role == "user" else f"[{m.role}] {m.content}" for m in messages), CLIPS[0]),
        "texts": [len(text) if withheld else _clip(text, max_chars) for text in different],
        "answers": {
            policy: [different.index(row.response), *_told(row, is_graded=case.is_graded, withheld=withheld)]
            for policy, row in rows.items()
        },
        "sha256": [_sha256(case.prompt.text), "" if withheld else _sha256(said)],
        "exact": int(not withheld and _clip(said, max_chars) == said),
        "verdicts": {vs: winner_of(comparison) for vs, comparison in case.comparisons.items()},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _told(row: GradeRow, *, is_graded: bool, withheld: bool) -> tuple[str, int, int, str]:
    """(grade, bad, cut off, why). A judge may quote an answer, so its words go where the answer goes."""
    grade = row.grade.value if row.grade is not None else "unscored" if is_graded else ""
    cut = row.finish_reason is FinishReason.LENGTH and not row.no_answer
    why = f"no answer: {row.no_answer.replace('_', ' ')}" if row.no_answer else "" if withheld else row.rationale
    return grade, int(is_graded and row.is_bad), int(cut), visible(why[:MAX_WHY])


def _marks(case: Case) -> list[str]:
    """What a reader may look for apart from the change."""
    row = case.candidate
    kinds = {comparison.kind for comparison in case.comparisons.values()}
    broken = degeneration_of(row.response, row.finish_reason, prompt=case.prompt.text) is not None
    found = {
        "unscored": case.is_graded and any(row.grade is None for row in case.rows.values()),
        "disagreement": bool(kinds & {VerdictKind.INCONSISTENT, VerdictKind.UNDECIDED}),
        "degenerate": broken,
        "cut off": row.finish_reason is FinishReason.LENGTH and not row.no_answer,
    }
    return [mark for mark, is_there in found.items() if is_there]


def _clip(text: str, max_chars: int) -> str:
    rest = len(text) - max_chars
    return visible(text) if rest <= 0 else visible(text[:max_chars]) + f"\n… {rest:,} more characters in grades.jsonl"
