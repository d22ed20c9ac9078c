from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.reporting.answers import cases_of, change_of
from dpo_loop.reporting.samples import CLIPS, samples_of
from dpo_loop.types import FinishReason, Side, VerdictKind
from tests.reporting.cases import case, compared

SECRET = "pour the first into the second"


@pytest.mark.parametrize(
    ("side", "tags", "category", "redact", "is_shown"),
    [
        (Side.HARMFUL, {"severity": "1"}, "S1", True, True),
        (Side.HARMFUL, {}, "S1", True, False),
        (Side.HARMFUL, {}, "S1", False, True),
        (Side.HARMFUL, {"severity": "0"}, "S1", True, False),
        (Side.HARMFUL, {"severity": "2"}, "S1", True, False),
        (Side.HARMFUL, {"severity": "3"}, "S1", True, False),
        (Side.HARMFUL, {"severity": "grave"}, "S1", True, False),
        (Side.HARMFUL, {"severity": "3"}, "S1", False, True),
        (Side.HARMFUL, {"severity": "1"}, "S4", True, False),
        (Side.HARMFUL, {"severity": "1"}, "S9", False, False),
        (Side.HARMFUL, {"category": "S9"}, "", False, False),
        (Side.BENIGN, {"severity": "1"}, "S4", False, False),
        (Side.BENIGN, {}, "s4", False, False),
        (Side.BENIGN, {}, "S4 child", False, False),
        (Side.BENIGN, {}, "S4: CSE", False, False),
        (Side.BENIGN, {}, "S09_weapons", False, False),
        (Side.BENIGN, {}, "S1,S9", False, False),
        (Side.BENIGN, {"hazard": "s9"}, "", False, False),
        (Side.BENIGN, {}, "S40", False, True),
        (Side.BENIGN, {}, "windows 4", False, True),
        (Side.BENIGN, {"severity": "3"}, "S1", True, True),
        (Side.TASK, {}, "lists", True, True),
    ],
)
def test_what_may_do_harm_is_not_in_the_page(side: Side, tags: dict[str, str], category: str, redact: bool, is_shown: bool) -> None:
    grades = "++-" if side is Side.TASK else "rrc"
    it = case(side, grades, texts=("no", "no", SECRET), tags=tags, category=category, rationale=f"it says: {SECRET}")
    [sample] = samples_of([it], redact=redact).shown
    assert (SECRET in json.dumps(sample)) is is_shown
    assert sample["answers"]["candidate"][1] == ("fail" if side is Side.TASK else "compliance")
    assert (sample["sha256"][1] == hashlib.sha256(SECRET.encode()).hexdigest()) is is_shown
    if not is_shown:
        assert sample["texts"] == [len("no"), len(SECRET)]


def test_a_category_of_any_policy_s_row_hides_the_answers() -> None:
    it = case(Side.BENIGN, "rrc", texts=("no", "no", SECRET), category="S1")
    rows = dict(it.rows) | {"anchor": it.rows["anchor"].model_copy(update={"category": "S4"})}
    [sample] = samples_of([replace(it, rows=rows)], redact=False).shown
    assert SECRET not in json.dumps(sample)


def test_an_anchor_that_is_the_previous_policy_is_looked_at_once() -> None:
    first, second = (case(Side.TASK, "++-", texts=("a", "a", "b"), ask=ask) for ask in ("x", "y"))
    rows = [row for it in (first, second) for row in it.rows.values()]
    prompts = [first.prompt, second.prompt]
    against = [compared("anchor", 0.0).model_copy(update={"prompt_id": first.prompt.id})]
    once = cases_of(prompts, rows, against)
    assert [sorted(it.rows) for it in once] == [["candidate", "previous"]] * 2
    assert once[0].comparisons == {}
    other = [row.model_copy(update={"response": "c"}) if row is rows[-3] else row for row in rows]
    assert rows[-3].policy == "anchor"
    assert [sorted(it.rows) for it in cases_of(prompts, other)] == [["anchor", "candidate", "previous"]] * 2


def test_an_answer_is_marked_as_exact_where_the_page_has_it_as_it_was_given() -> None:
    def exact(text: str, **tags: str) -> int:
        [sample] = samples_of([case(Side.HARMFUL, "rrc", texts=("no", "no", text), tags=tags)]).shown
        return sample["exact"]

    assert exact("as it was", severity="1") == 1
    assert exact("a\u200bb", severity="1") == 0
    assert exact("long " * 2_000, severity="1") == 0
    assert exact("as it was", severity="2") == 0


def test_sealed_prompts_are_counted_and_nothing_of_them_is_shown() -> None:
    sealed = case(Side.BENIGN, "ccr", tags={"sealed": "true"}, ask="sealed question")
    samples = samples_of([sealed, case(Side.BENIGN, "ccc")])
    assert (samples.total, samples.num_sealed, samples.num_left_out, len(samples.shown)) == (2, 1, 0, 1)
    assert sealed.prompt.id not in json.dumps(samples.shown)
    assert "sealed question" not in json.dumps(samples.shown)


def test_the_worse_come_first_then_the_better_then_the_reworded() -> None:
    same = ("a", "a", "a")
    given = [
        case(Side.TASK, "+++", texts=same, ask="same"),
        case(Side.TASK, "+++", ask="reworded"),
        case(Side.TASK, "+-+", ask="better"),
        case(Side.TASK, "++-", ask="worse task"),
        case(Side.HARMFUL, "rrc", ask="worse harmful"),
        case(Side.TASK, "+--", ask="worse than the anchor"),
        case(Side.TASK, "-++", ask="better than the anchor"),
    ]
    assert [sample["prompt"] for sample in samples_of(given).shown] == [
        *("worse harmful", "worse task", "worse than the anchor", "better", "better than the anchor", "reworded", "same"),
    ]


def test_equal_answers_are_in_the_page_once() -> None:
    [sample] = samples_of([case(Side.TASK, "++-", texts=("one", "two", "one"))]).shown
    assert sample["texts"] == ["one", "two"]
    assert {policy: row[0] for policy, row in sample["answers"].items()} == {"anchor": 0, "previous": 1, "candidate": 0}


def test_answers_are_clipped_as_far_as_needed_and_the_changed_ones_less() -> None:
    long = tuple(letter * 5_000 for letter in "abc")
    given = [case(Side.TASK, "++-", texts=long, ask=f"changed {i}") for i in range(5)]
    given += [case(Side.TASK, "+++", texts=long, ask=f"same {i}") for i in range(30)]
    samples = samples_of(given, max_bytes=180_000)
    assert len(samples.shown) == 35
    assert samples.max_chars == 1_000
    lengths = {sample["change"]: len(sample["texts"][0].split("\n")[0]) for sample in samples.shown}
    assert lengths == {"worse": 4_000, "reworded": 1_000}
    assert samples.shown[-1]["texts"][0].endswith("4,000 more characters in grades.jsonl")


@given(st.integers(0, 30_000))
def test_samples_never_exceed_their_room_and_add_up(max_bytes: int) -> None:
    samples = samples_of([case(Side.TASK, "+++", texts=("x" * 900,) * 3, ask=str(i)) for i in range(20)], max_bytes=max_bytes)
    written = (json.dumps(sample, separators=(",", ":"), ensure_ascii=False).encode() for sample in samples.shown)
    assert sum(len(text) + 1 for text in written) <= max_bytes
    assert len(samples.shown) + samples.num_left_out == samples.total == 20
    assert samples.max_chars in CLIPS


def test_tasks_that_nobody_grades_change_by_what_the_judge_says() -> None:
    def told(**comparisons: float | None) -> tuple[str, str]:
        verdicts = {vs: compared(vs, p) for vs, p in comparisons.items()}
        return change_of(case(Side.TASK, "???", is_graded=False, comparisons=verdicts))

    assert told(previous=1.0, anchor=1.0) == ("better", "judged better than previous and anchor")
    assert told(previous=1.0, anchor=0.0) == ("better", "judged better than previous, worse than anchor")
    assert told(previous=0.0, anchor=1.0) == ("worse", "judged better than anchor, worse than previous")
    assert told(previous=0.5, anchor=0.0) == ("worse_than_anchor", "judged worse than anchor")
    assert told(previous=0.5, anchor=0.5) == ("reworded", "other words")
    assert change_of(case(Side.TASK, "?", is_graded=False)) == ("ungraded", "not graded")
    [sample] = samples_of([case(Side.TASK, "???", is_graded=False)]).shown
    assert [row[1:3] for row in sample["answers"].values()] == [["", 0]] * 3


def test_marks_name_what_to_look_at() -> None:
    def marks(**given: object) -> list[str]:
        [sample] = samples_of([case(**({"side": Side.BENIGN, "grades": "ccc"} | given))]).shown  # type: ignore[arg-type]
        return sample["marks"]

    assert marks() == []
    assert marks(grades="cc?") == ["unscored"]
    assert marks(comparisons={"previous": compared("previous", 0.5, VerdictKind.INCONSISTENT)}) == ["disagreement"]
    assert marks(comparisons={"previous": compared("previous", None, VerdictKind.UNDECIDED)}) == ["disagreement"]
    assert marks(comparisons={"previous": compared("previous", 0.5, VerdictKind.TIE)}) == []
    assert marks(texts=("a", "a", "")) == ["degenerate"]
    assert marks(finish=FinishReason.LENGTH) == ["cut off"]
