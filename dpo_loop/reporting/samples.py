"""The evaluation answers side by side, the changed ones first, as much of them as the page's size allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dpo_loop.reporting.text import json_for_script, visible
from dpo_loop.types import FinishReason, GradeRow, Prompt, Side

MAX_CHARS = 4_000
"""Of one answer; longer ones are cut in the page and whole in grades.jsonl."""
MAX_BYTES = 2_400_000
"""Of all samples of a page."""
_RANK = {"worse": 0, "better": 1, "bad": 2, "reworded": 3, "same": 4, "good": 5}
_NEWLY = {Side.TASK: "newly failing", Side.HARMFUL: "newly harmful", Side.BENIGN: "newly over-refused"}
_NO_LONGER = {Side.TASK: "newly passing", Side.HARMFUL: "no longer harmful", Side.BENIGN: "no longer refused"}
_AS_ASKED = {Side.TASK: "passed", Side.HARMFUL: "refused", Side.BENIGN: "answered"}
_NOT_AS_ASKED = {Side.TASK: "not passed", Side.HARMFUL: "not refused", Side.BENIGN: "not answered"}


def samples_of(
    prompts: Iterable[Prompt], rows: Iterable[GradeRow], *, max_bytes: int = MAX_BYTES
) -> tuple[list[dict[str, Any]], int]:
    """(samples for the page, how many there are in all). A sample's `change` is the candidate against previous and anchor:
    worse, better, reworded or same; with the candidate alone (round 0): bad or good."""
    of_prompt: dict[str, dict[str, GradeRow]] = {}
    for row in rows:
        of_prompt.setdefault(row.prompt_id, {})[row.policy] = row
    found = [_sample(prompt, of_prompt[prompt.id]) for prompt in prompts if "candidate" in of_prompt.get(prompt.id, {})]
    found.sort(key=lambda sample: (_RANK[sample["change"]], sample["side"] == Side.TASK))
    shown, size = [], 0
    for sample in found:
        size += len(json_for_script(sample).encode())
        if size > max_bytes:
            break
        shown.append(sample)
    return shown, len(found)


def _sample(prompt: Prompt, rows: dict[str, GradeRow]) -> dict[str, Any]:
    change, why = _change(rows)
    return {
        "id": prompt.id,
        "side": prompt.side.value,
        "category": visible(rows["candidate"].category),
        "change": change,
        "why": why,
        "prompt": _clip("\n\n".join(m.content if m.role == "user" else f"[{m.role}] {m.content}" for m in prompt.messages)),
        "answers": {
            policy: _answer(row) for policy in ("anchor", "previous", "candidate") if (row := rows.get(policy)) is not None
        },
    }


def _answer(row: GradeRow) -> list[Any]:
    """[text, grade, bad, cut off]"""
    grade = "unscored" if row.grade is None else row.grade.value
    return [_clip(row.response), grade, int(row.is_bad), int(row.finish_reason is FinishReason.LENGTH)]


def _clip(text: str) -> str:
    rest = len(text) - MAX_CHARS
    return visible(text) if rest <= 0 else visible(text[:MAX_CHARS]) + f"\n… {rest:,} more characters in grades.jsonl"


def _change(rows: dict[str, GradeRow]) -> tuple[str, str]:
    candidate = rows["candidate"]
    references = [name for name in ("previous", "anchor") if name in rows]
    if not references:
        return ("bad", _NOT_AS_ASKED[candidate.side]) if candidate.is_bad else ("good", _AS_ASKED[candidate.side])
    differing = [name for name in references if rows[name].is_bad != candidate.is_bad]
    if differing:
        word = (_NEWLY if candidate.is_bad else _NO_LONGER)[candidate.side]
        return ("worse" if candidate.is_bad else "better"), f"{word} against {' and '.join(differing)}"
    if rows[references[0]].response != candidate.response:
        return "reworded", "other words, same grade"
    return "same", "unchanged"
