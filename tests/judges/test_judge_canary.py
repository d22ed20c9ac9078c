"""The figures of the judge canary, by hand, and what the file is."""

from __future__ import annotations

import hashlib
from collections import Counter
from importlib.resources import files

import pytest

from dpo_loop.types import Grade, JudgeCanary, Side
from judges import grading
from judges.canary import FILE, CanaryRow, canary_of, load_canary, rows_for
from judges.config import BySideGrader, GuardGrader, OpenAIJudge, RefusalHeuristic, VerifierGrader
from judges.config import JudgeGrader as ByJudge

REF, PART, COM = Grade.REFUSAL, Grade.PARTIAL, Grade.COMPLIANCE


def row(number: int, label: str, kind: str) -> CanaryRow:
    return CanaryRow.model_validate(
        {"prompt_id": f"c-{number}", "prompt": "p", "response": "r", "label": label, "kind": kind, "side": "harmful"}
    )


ROWS = [
    row(1, "refusal", "plain"), row(2, "refusal", "plain"), row(3, "refusal", "plain"), row(4, "refusal", "empty"),
    row(5, "partial", "partial"), row(6, "partial", "partial"),
    row(7, "compliance", "fiction"), row(8, "compliance", "fiction"), row(9, "compliance", "fiction"), row(10, "compliance", "fiction"),
]  # fmt: skip


def test_the_figures_are_those_computed_by_hand() -> None:
    # truth \ said   refusal  partial  compliance  nothing
    # refusal           3        0          0         1      4
    # partial           1        1          0         0      2
    # compliance        0        1          3         0      4
    #                   4        2          3         1     10
    canary = canary_of("judge", ROWS, [REF, REF, REF, None, REF, PART, PART, COM, COM, COM])
    assert (canary.num_rows, canary.num_right, canary.num_ungraded) == (10, 7, 1)
    assert canary.accuracy == 0.7
    by_chance = (4 * 4 + 2 * 2 + 4 * 3) / 100
    assert canary.kappa == pytest.approx((0.7 - by_chance) / (1 - by_chance))
    assert canary.sensitivity == pytest.approx(5 / 6), "of 6 rows that give something, one was called a refusal"
    assert canary.specificity == pytest.approx(3 / 4), "an ungraded refusal was not called one"
    assert canary.by_kind == {"plain": (3, 3), "empty": (0, 1), "partial": (1, 2), "fiction": (3, 4)}
    assert canary.wrong == ("c-4", "c-5", "c-7")


def test_a_grader_that_always_says_the_same_has_no_kappa_worth_the_name() -> None:
    canary = canary_of("judge", ROWS, [REF] * 10)
    assert (canary.accuracy, canary.sensitivity, canary.specificity) == (0.4, 0.0, 1.0)
    assert canary.kappa == pytest.approx(0.0)


def test_nothing_graded_is_nothing_right() -> None:
    canary = canary_of("judge", ROWS, [None] * 10)
    assert (canary.accuracy, canary.num_ungraded, canary.sensitivity, canary.specificity) == (0.0, 10, 0.0, 0.0)
    assert canary.kappa == pytest.approx(0.0)


def test_where_there_are_no_refusals_there_is_no_rate_of_them() -> None:
    canary = canary_of("judge", ROWS[6:], [COM] * 4)
    assert (canary.accuracy, canary.specificity, canary.kappa) == (1.0, None, None)
    assert JudgeCanary.model_validate_json(canary.model_dump_json()) == canary


def test_the_file_is_read_with_the_side_of_every_prompt() -> None:
    rows = load_canary()
    assert Counter(row.side for row in rows) == {Side.HARMFUL: 47, Side.BENIGN: 13}
    assert all(row.side is Side.BENIGN for row in rows if row.kind == "benign_compliance")
    assert all(row.side is Side.HARMFUL for row in rows if "[harmful detail omitted]" in row.response)
    prompt, answer = rows[0].question
    assert (prompt.side, prompt.text, answer.text) == (Side.HARMFUL, rows[0].prompt, rows[0].response)
    assert len({answer.id for _, answer in (row.question for row in rows)}) == 60


def test_a_changed_canary_comes_with_a_new_version_of_the_grade_stage() -> None:
    # If this fails: a new file with a new version, VERSION in judges/grading.py bumped, and the new values pinned here.
    canary = files("dpo_loop.prompts") / "sets" / FILE
    assert (hashlib.sha256(canary.read_bytes()).hexdigest()[:16], grading.VERSION) == ("3037a9f7098bdbdb", 5)


HEURISTIC = RefusalHeuristic(kind="heuristic")
VERIFIER = VerifierGrader(kind="verifier", function="a:b")
JUDGE = ByJudge(kind="judge", judge=OpenAIJudge(kind="openai", model="m"))


def guard(form: str) -> GuardGrader:
    return GuardGrader.model_validate(
        {"kind": "guard", "format": form, "model": "m", "base_url": "http://localhost/v1", "api_key_env": ""}
    )


def test_a_grader_is_shown_the_rows_that_it_can_see() -> None:
    assert len(rows_for(JUDGE)) == len(rows_for(HEURISTIC)) == 60
    assert rows_for(VERIFIER) == rows_for(BySideGrader(kind="by_side", harmful=VERIFIER, benign=VERIFIER)) == []
    by_guard = rows_for(BySideGrader(kind="by_side", harmful=guard("llama_guard"), benign=VERIFIER))
    assert {row.side for row in by_guard} == {Side.HARMFUL}
    assert "partial" not in {row.kind for row in by_guard}
    assert Counter(row.label for row in by_guard) == {"refusal": 24, "compliance": 18}
    mixed = rows_for(BySideGrader(kind="by_side", harmful=guard("shieldgemma"), benign=JUDGE))
    assert [row.side for row in mixed if row.kind == "partial"] == [Side.BENIGN] * 2
