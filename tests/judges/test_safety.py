"""The grade stage with a judge of safety: every answer of every policy, once, and nothing is a grade that nobody gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.errors import InputError, JudgeError, JudgeUnavailableError
from dpo_loop.exchange import read_ballots
from dpo_loop.types import Classified, Grade
from judges.config import BySideGrader, GuardGrader, JudgeGrader, RefusalHeuristic, VerifierGrader
from tests.judges.classifying import grade, is_canary, knowing, labelled, shown
from tests.judges.stub import KEY_ENV, Step, Stub, chat, fails
from tests.judges.test_guards import completion, wild

REF, PART, COM = Grade.REFUSAL, Grade.PARTIAL, Grade.COMPLIANCE
NUM_CANARY = 60
ANSWERS = {
    "candidate": ["no", "half of it", "yes", "no"],
    "previous": ["no", "yes", "yes", "yes"],
    "anchor": ["no way", "no", "half", "yes"],
}
EXPECTED = [REF, PART, COM, REF, REF, COM, COM, COM, REF, REF, PART, COM]
NUM_TEXTS = 9
"""Different answers to a prompt."""


def judge_at(stub: Stub, **settings: Any) -> JudgeGrader:
    return JudgeGrader(kind="judge", judge=stub.judge(concurrency=16, **settings))


def asked(stub: Stub) -> list[tuple[str, str]]:
    """Questions about answers of policies, without the canary's."""
    return [shown(seen.body) for seen in stub.seen if not is_canary(seen.body)]


def test_every_answer_of_every_policy_is_classified_with_the_judges_words(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing()
    rows, canary, figures = grade(tmp_path, judge_at(stub), ANSWERS)
    assert [row.grade for row in rows] == EXPECTED
    assert {row.rationale for row in rows} == {"by heart"}
    assert canary is not None
    assert (canary.accuracy, canary.grader) == (1.0, "openai_compatible:judge by rubric refusal-harm")
    assert figures["calls_asked"] == NUM_CANARY + NUM_TEXTS
    assert (figures["input_tokens"], figures["cost_usd"]) == (100 * (NUM_CANARY + NUM_TEXTS), 0.0)
    assert figures["sides"]["harmful"]["judge"] == "openai_compatible:judge"


def test_equal_texts_to_a_prompt_are_one_question_even_where_it_fails(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing(lambda body: chat("I had rather not say"))
    rows, _, figures = grade(tmp_path, judge_at(stub), ANSWERS)
    assert [row.grade for row in rows] == [None] * 12
    assert len(asked(stub)) == 2 * NUM_TEXTS, "a reply that cannot be read is asked for once more"
    assert len(set(asked(stub))) == NUM_TEXTS
    assert figures["undecided_calls"] == {"malformed": NUM_TEXTS}


def test_ballots_of_answers_and_canary_are_published_once_each(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing()
    grade(tmp_path, judge_at(stub), ANSWERS)
    ballots = list(read_ballots(tmp_path / "grade"))
    safety = [ballot for ballot in ballots if isinstance(ballot.outcome, Classified)]
    assert len(safety) == len({ballot.key for ballot in safety}) == NUM_CANARY + NUM_TEXTS
    assert {ballot.right_id for ballot in safety} == {None}
    assert {ballot.key for ballot in safety} == set(stub.keys)


FAILURES = {
    "refusal": chat(None, refusal="I cannot judge that"),
    "filter": fails(400, "flagged by our usage policy", code="invalid_prompt"),
    "cut off": chat('{"rationale": "this ans', finish="length"),
    "prose": chat("refusal"),
    "verdict": chat('{"rationale": "", "winner": "A"}'),
    "empty": chat(""),
    "too long": fails(400, "maximum context length is 10 tokens"),
    "broken": Step(body=b"<html>"),
    "down": fails(500, "oops"),
    "late": chat('{"rationale": "", "label": "refusal"}', delay_s=2.0),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_unscored_and_the_rest_is_graded(tmp_path: Path, stub: Stub, case: str) -> None:
    stub.policy = knowing(lambda body: FAILURES[case] if shown(body)[1] == "half of it" else labelled("refusal", "so it is"))
    safety = judge_at(stub, max_attempts=1, attempt_timeout_s=1.0, deadline_s=2.0)
    rows, canary, _ = grade(tmp_path, safety, ANSWERS)
    assert [row.grade for row in rows] == [REF, None, *[REF] * 10]
    assert (rows[1].rationale, rows[1].response, rows[1].no_answer) == ("", "half of it", "")
    assert canary is not None
    assert canary.num_ungraded == 0


# ------------------------------------------------------------------------------------------------------- again and anew


def test_a_stage_that_was_killed_pays_for_nothing_twice(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing(lambda body: fails(401, "the key was revoked") if shown(body)[1] == "no way" else labelled("refusal"))
    with pytest.raises(JudgeError, match="revoked"):
        grade(tmp_path, judge_at(stub), ANSWERS)
    assert not (tmp_path / "grade").exists()
    before = len({seen.key for seen in stub.seen})
    stub.seen.clear()
    stub.policy = knowing()
    _, _, figures = grade(tmp_path, judge_at(stub), ANSWERS)
    assert len(stub.seen) == figures["calls_asked"] < NUM_TEXTS
    assert figures["calls_asked"] + figures["calls_from_ledger"] == NUM_CANARY + NUM_TEXTS
    assert before > NUM_CANARY


def test_answers_of_previous_and_anchor_are_known_in_the_next_round_and_the_canary_is_not(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing()
    grade(tmp_path, judge_at(stub), ANSWERS, round_number=1)
    first = set(stub.keys)
    stub.seen.clear()
    rows, canary, figures = grade(tmp_path, judge_at(stub), ANSWERS, round_number=2, out="again")
    assert [row.grade for row in rows] == EXPECTED
    assert canary is not None
    assert all(is_canary(seen.body) for seen in stub.seen)
    assert (figures["calls_asked"], figures["calls_from_ledger"]) == (NUM_CANARY, NUM_TEXTS)
    assert not first & set(stub.keys)


@pytest.mark.parametrize("change", [{"revision": "2"}, {"model": "other"}, {"rubric": "helpfulness"}, {"rationale": False}])
def test_a_changed_judge_grades_every_policy_anew(tmp_path: Path, stub: Stub, change: dict[str, Any]) -> None:
    stub.policy = knowing()
    grade(tmp_path, judge_at(stub), ANSWERS, round_number=1)
    stub.seen.clear()
    told = {"label": "compliance"} if "rationale" in change else {"label": "compliance", "rationale": "changed my mind"}
    stub.policy = lambda body: chat(json.dumps(told))
    rows, _, figures = grade(tmp_path, judge_at(stub, **change), ANSWERS, round_number=2, out="again")
    assert len(asked(stub)) == NUM_TEXTS
    assert figures["calls_from_ledger"] == 0
    assert {row.grade for row in rows} == {COM}


def test_a_judge_that_answers_nothing_at_all_ends_the_stage(tmp_path: Path, stub: Stub) -> None:
    stub.policy = lambda body: fails(503, "down")
    with pytest.raises(JudgeUnavailableError, match="has answered nothing"):
        grade(tmp_path, judge_at(stub, outage_s=0.0), ANSWERS)
    assert not (tmp_path / "grade").exists()


def test_a_rubric_that_needs_a_reference_is_refused_before_anything_is_asked(tmp_path: Path, stub: Stub) -> None:
    with pytest.raises(InputError, match="rubric correctness compares with a reference"):
        grade(tmp_path, judge_at(stub, rubric="correctness"), ANSWERS)
    assert not stub.seen


# ------------------------------------------------------------------------------------------------------------- two graders


def guard(stub: Stub, form: str) -> GuardGrader:
    where = {"kind": "guard", "format": form, "model": "guard", "base_url": stub.base_url, "api_key_env": KEY_ENV}
    return GuardGrader.model_validate(where)


def test_each_side_has_its_grader_and_the_figures_of_both(tmp_path: Path, stub: Stub) -> None:
    def policy(body: dict[str, Any]) -> Step:
        if body["model"] == "guard":
            answer = body["messages"][-1]["content"]
            return chat("safe" if answer.startswith("no") else "unsafe\nS1")
        return knowing()(body)

    stub.policy = policy
    safety = BySideGrader(kind="by_side", harmful=guard(stub, "llama_guard"), benign=judge_at(stub))
    rows, canary, figures = grade(tmp_path, safety, ANSWERS)
    assert [row.grade for row in rows] == [REF, COM, COM, REF, REF, COM, COM, COM, REF, REF, PART, COM]
    assert [row.rationale for row in rows[:4]] == ["safe", "unsafe S1", "by heart", "by heart"]
    assert canary is not None
    assert canary.grader == "llama_guard:guard; benign prompts: openai_compatible:judge by rubric refusal-harm"
    assert canary.num_rows == NUM_CANARY - 5, "a guard has no word for a part, so rows of harmful parts are not for it"
    assert list(figures["sides"]) == ["harmful", "benign"]
    assert figures["calls_asked"] == sum(side["calls_asked"] for side in figures["sides"].values()) == 55 + NUM_TEXTS


def test_wildguard_grades_both_sides(tmp_path: Path, stub: Stub) -> None:
    def policy(body: dict[str, Any]) -> Step:
        answer = body["prompt"].split("AI assistant:\n")[1].split("\n\n---")[0]
        return completion("??") if answer == "half of it" else wild("yes", "yes" if answer.startswith("no") else "no", "yes")

    stub.policy = policy
    rows, canary, _ = grade(tmp_path, guard(stub, "wildguard"), ANSWERS)
    assert [row.grade for row in rows[:8]] == [PART, None, COM, REF, PART, COM, COM, COM]
    assert canary is not None
    assert canary.num_rows == NUM_CANARY - 7


def test_programs_may_grade_a_side_and_cost_nothing(tmp_path: Path, stub: Stub) -> None:
    stub.policy = knowing()
    verifier = VerifierGrader(kind="verifier", function="tests.judges.world:refuses_if_it_says_no")
    safety = BySideGrader(kind="by_side", harmful=verifier, benign=judge_at(stub))
    rows, canary, figures = grade(tmp_path, safety, {"candidate": ["no", "ok", "yes", "no"]})
    assert [row.grade for row in rows] == [REF, COM, COM, REF]
    assert canary is not None
    assert canary.num_rows == 13, "a verifier is not tested by prose"
    assert figures["calls_asked"] == 13 + 2


def test_a_verifier_has_no_canary_and_the_heuristic_has_one(tmp_path: Path) -> None:
    verifier = VerifierGrader(kind="verifier", function="tests.judges.world:refuses_if_it_says_no")
    answers = {"candidate": ["no", "ok", "ok", "ok"]}
    _, canary, figures = grade(tmp_path / "verifier", verifier, answers)
    assert canary is None
    assert figures == {"grader": "verifier:tests.judges.world:refuses_if_it_says_no"}
    _, canary, figures = grade(tmp_path / "heuristic", RefusalHeuristic(kind="heuristic"), answers)
    assert canary is not None
    assert (canary.grader, canary.num_rows, canary.num_ungraded) == ("heuristic", 60, 4)
    assert figures == {"grader": "heuristic"}
