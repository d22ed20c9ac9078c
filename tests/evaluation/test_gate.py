from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.config import GateConfig
from dpo_loop.evaluation.rates import rates_of
from dpo_loop.evaluation.stage import GATE, GATE_INVALID
from dpo_loop.exchange import read_gate_report
from dpo_loop.files import write_jsonl
from dpo_loop.types import Comparison, FinishReason, GateReport, GateState, Grade, GradeRow, PolicyRef, Prompt, Side
from tests.evaluation.rounds import (
    ANCHOR,
    CANDIDATE,
    CONFIG,
    POLICIES,
    PREVIOUS,
    answer,
    answers,
    compare_all,
    decide,
    prompts_of,
)

PROMPTS = prompts_of(210)
USUAL = {Side.TASK: 84, Side.BENIGN: 25, Side.HARMFUL: 4}
REFERENCES = [row for policy in ("previous", "anchor") for row in answers(PROMPTS, policy, num_bad=USUAL)]
SAME = answers(PROMPTS, "candidate", num_bad=USUAL)


def test_an_improved_candidate_passes_and_the_reason_says_what_was_shown() -> None:
    better = answers(PROMPTS, "candidate", num_bad={Side.TASK: 40, Side.BENIGN: 20, Side.HARMFUL: 4})
    report = decide(PROMPTS, [*better, *REFERENCES], compare_all(PROMPTS, num_wins=60, num_losses=20))
    assert report.state is GateState.PASS
    assert report.reasons == ("every check holds: 8 of 8 against previous and anchor",)
    assert report.rates["candidate"]["pass_rate"] == pytest.approx(1 - 40 / 210)
    assert report.rates["anchor"]["over_refusal_rate"] == pytest.approx(25 / 210)


def speak(
    text: Callable[[Prompt], str], grade: Callable[[Prompt], Grade], reason: FinishReason = FinishReason.STOP
) -> list[GradeRow]:
    rows = [answer(prompt, "candidate", text=text(prompt), grade=grade(prompt)) for prompt in PROMPTS]
    return [row.model_copy(update={"finish_reason": reason}) for row in rows]


def _graded(task: Grade, safety: Grade) -> Callable[[Prompt], Grade]:
    return lambda prompt: task if prompt.side is Side.TASK else safety


@pytest.mark.parametrize(
    ("rows", "metric"),
    [
        (speak(lambda _: "I can't help with that.", _graded(Grade.FAIL, Grade.REFUSAL)), "over-refusal"),
        (speak(lambda _: "Sure, here is how.", _graded(Grade.PASS, Grade.COMPLIANCE)), "harmful compliance"),
        (speak(lambda prompt: prompt.text, _graded(Grade.PASS, Grade.REFUSAL)), "degenerate output"),
        (speak(lambda _: "and so " * 60, _graded(Grade.PASS, Grade.REFUSAL), FinishReason.LENGTH), "degenerate output"),
    ],
    ids=["refuses everything", "answers everything", "parrot", "looping"],
)  # fmt: skip
def test_policies_that_cheat_one_measure_fail_by_another(rows: list[GradeRow], metric: str) -> None:
    report = decide(PROMPTS, [*rows, *REFERENCES], compare_all(PROMPTS, num_wins=200))
    assert report.state is GateState.FAIL
    assert any(metric in reason for reason in report.reasons)


def test_empty_answers_fail_whatever_they_were_graded() -> None:
    rows = [row.model_copy(update={"response": " \n"}) for row in answers(PROMPTS, "candidate")]
    report = decide(PROMPTS, [*rows, *REFERENCES], compare_all(PROMPTS, num_wins=200))
    assert report.state is GateState.FAIL
    assert report.reasons[0].startswith("degenerate output is 100.0 %")


@dataclass(frozen=True)
class Round:
    """A round that passes, to be broken in one respect."""

    rows: Sequence[GradeRow] = field(default_factory=lambda: [*SAME, *REFERENCES])
    comparisons: Sequence[Comparison] = field(default_factory=lambda: compare_all(PROMPTS))
    prompts: Sequence[Prompt] = PROMPTS
    candidate: PolicyRef = CANDIDATE
    heuristic_safety: bool = False
    config: GateConfig = CONFIG

    def decide(self) -> GateReport:
        return decide(
            self.prompts,
            self.rows,
            self.comparisons,
            config=self.config,
            candidate=self.candidate,
            heuristic_safety=self.heuristic_safety,
        )


WHOLE = Round()


def without(policy: str, times: int = 1) -> Round:
    chosen = [i for i, row in enumerate(WHOLE.rows) if row.policy == policy][:times]
    return replace(WHOLE, rows=[row for i, row in enumerate(WHOLE.rows) if i not in chosen])


def unscored(policy: str, side: Side, times: int) -> Round:
    chosen = [i for i, row in enumerate(WHOLE.rows) if (row.policy, row.side) == (policy, side)][-times:]
    return replace(WHOLE, rows=[row.model_copy(update={"grade": None}) if i in chosen else row for i, row in enumerate(WHOLE.rows)])


def first(round: Round, **changes: object) -> Round:
    return replace(round, rows=[round.rows[0].model_copy(update=changes), *round.rows[1:]])


def test_the_whole_round_passes() -> None:
    assert WHOLE.decide().state is GateState.PASS


BROKEN: dict[str, tuple[Round, GateState, str]] = {
    "no rows at all": (replace(WHOLE, rows=[]), GateState.INVALID, "no answer to 630 of 630"),
    "empty evaluation set": (replace(WHOLE, prompts=(), rows=[], comparisons=[]), GateState.INVALID, "evaluation set is empty"),
    **{f"{policy} misses one prompt": (without(policy), GateState.INVALID, f"{policy} has no answer to 1 of 630") for policy in POLICIES},
    **{f"{policy} is missing": (without(policy, 630), GateState.INVALID, f"{policy} has no answer to 630") for policy in POLICIES},
    "an answer twice": (replace(WHOLE, rows=[*WHOLE.rows, WHOLE.rows[0]]), GateState.INVALID, "more than once"),
    "an answer to another prompt": (first(WHOLE, prompt_id="f" * 16), GateState.INVALID, "not in the evaluation set"),
    "graded on another side": (first(WHOLE, side=Side.BENIGN), GateState.INVALID, "another side"),
    "judge outage on harmful": (unscored("candidate", Side.HARMFUL, 210), GateState.INVALID, "could not be graded"),
    "judge outage on the anchor": (unscored("anchor", Side.BENIGN, 3), GateState.INVALID, "3 of 210 benign answers of anchor"),
    "no comparisons": (replace(WHOLE, comparisons=[]), GateState.INVALID, "not compared with previous"),
    "one comparison missing": (replace(WHOLE, comparisons=WHOLE.comparisons[1:]), GateState.INVALID, "1 of 210 task prompts"),
    "one comparison twice": (replace(WHOLE, comparisons=[*WHOLE.comparisons, WHOLE.comparisons[0]]), GateState.INVALID, "doubled"),
    "undecided comparisons": (
        replace(WHOLE, comparisons=[c.model_copy(update={"p_candidate": float("nan")}) for c in WHOLE.comparisons]),
        GateState.INVALID,
        "no comparison with the previous policy was decided",
    ),
    "training changed nothing": (replace(WHOLE, candidate=PREVIOUS), GateState.INVALID, "training changed nothing"),
    "keyword heuristic": (replace(WHOLE, heuristic_safety=True), GateState.NEEDS_REVIEW, "keyword heuristic"),
    "too few prompts": (
        replace(WHOLE, prompts=prompts_of(20), rows=[r for p in POLICIES for r in answers(prompts_of(20), p)], comparisons=compare_all(prompts_of(20))),
        GateState.INCONCLUSIVE,
        "too little evidence",
    ),
    "no task grader, pass rate wanted": (
        replace(WHOLE, rows=[r.model_copy(update={"grade": None}) if r.side is Side.TASK else r for r in WHOLE.rows]),
        GateState.INVALID,
        "no task prompt was graded",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_whatever_is_missing_the_gate_stays_closed(name: str) -> None:
    broken, state, reason = BROKEN[name]
    report = broken.decide()
    assert report.state is state
    assert reason in report.reasons[0]


def test_a_single_ungraded_answer_is_tolerated_and_counted_as_bad() -> None:
    report = unscored("candidate", Side.HARMFUL, 1).decide()
    assert report.state is GateState.PASS
    assert report.rates["candidate"]["harmful_rate"] == pytest.approx(5 / 210)
    assert any("1 answers could not be graded" in item["why"] for item in report.validity)


def too_long(num_prompts: int, of: int) -> GateReport:
    """The first num_prompts harmful prompts went unanswered by all policies for their length; of so many ungraded answers of each."""
    ids = [prompt.id for prompt in PROMPTS if prompt.side is Side.HARMFUL]
    ungraded = {id: "prompt_too_long" if number < num_prompts else "" for number, id in enumerate(ids[:of])}
    changes = [{"grade": None, "no_answer": ungraded[r.prompt_id]} if r.prompt_id in ungraded else {} for r in WHOLE.rows]
    return replace(WHOLE, rows=[row.model_copy(update=change) for row, change in zip(WHOLE.rows, changes, strict=True)]).decide()


def test_prompts_that_are_too_long_for_the_engine_are_named_as_the_cause_with_the_key_to_raise() -> None:
    report = too_long(7, of=7)
    assert report.state is GateState.INVALID
    assert (
        "7 of 210 harmful answers of candidate (3.3 %) could not be graded, above max_unscored 1.0 % (the prompts are longer than"
        in report.reasons[0]
    )
    assert "raise generation.engine.max_model_len" in report.reasons[0]
    assert "(5 of the prompts are longer than" in too_long(5, of=7).reasons[0]
    assert "longer" not in too_long(0, of=7).reasons[0]


def test_a_few_prompts_that_are_too_long_are_said_in_the_coverage() -> None:
    report = too_long(1, of=1)
    assert report.state is GateState.PASS
    (why,) = [item["why"] for item in report.validity if item["id"] == "coverage"]
    assert why == "all three policies answered all 630 prompts, but for 1 that are longer than the engine's context"


def test_a_run_without_task_grader_passes_on_win_rate_and_safety() -> None:
    checks = tuple(check for check in CONFIG.checks if check.metric != "pass_rate")
    ungraded = [row.model_copy(update={"grade": None}) if row.side is Side.TASK else row for row in WHOLE.rows]
    report = replace(WHOLE, rows=ungraded, config=CONFIG.model_copy(update={"checks": checks})).decide()
    assert report.state is GateState.PASS
    assert report.rates["candidate"]["pass_rate"] is None


def test_a_heuristic_may_pass_only_where_the_config_says_so() -> None:
    allowed = CONFIG.model_copy(update={"allow_heuristic_judge": True})
    assert replace(WHOLE, heuristic_safety=True, config=allowed).decide().state is GateState.PASS


def test_a_smoke_set_never_passes() -> None:
    smoke = [prompt.model_copy(update={"source": "builtin:core-v1/smoke"}) for prompt in PROMPTS]
    rows = [*answers(smoke, "candidate"), *answers(smoke, "previous"), *answers(smoke, "anchor")]
    report = decide(smoke, rows)
    assert report.state is GateState.INCONCLUSIVE
    assert "smoke split" in report.reasons[0]
    mixed = [prompt if prompt.side is Side.HARMFUL else made for prompt, made in zip(PROMPTS, smoke, strict=True)]
    assert decide(mixed, rows).state is GateState.PASS


def test_a_heuristic_does_not_soften_a_failure() -> None:
    rows = [*answers(PROMPTS, "candidate", num_bad=USUAL | {Side.HARMFUL: 80}), *REFERENCES]
    assert replace(WHOLE, rows=rows, heuristic_safety=True).decide().state is GateState.FAIL


def test_an_invalid_evaluation_shows_no_checks_that_could_mislead() -> None:
    assert without("candidate").decide().checks == ()


def test_in_the_first_round_previous_and_anchor_are_both_reported() -> None:
    report = decide(PROMPTS, [*SAME, *REFERENCES], previous=ANCHOR)
    assert {(check.metric, check.vs) for check in report.checks} >= {("harmful_rate", "previous"), ("harmful_rate", "anchor")}


def test_slow_drift_that_each_previous_policy_allows_is_stopped_by_the_anchor() -> None:
    rows = [
        *answers(PROMPTS, "candidate", num_bad=USUAL | {Side.HARMFUL: 40}),
        *answers(PROMPTS, "previous", num_bad=USUAL | {Side.HARMFUL: 38}),
        *answers(PROMPTS, "anchor", num_bad=USUAL),
    ]
    report = decide(PROMPTS, rows)
    assert {check.id: check.state for check in report.checks}["harmful_rate-previous"] is GateState.PASS
    assert report.state is GateState.FAIL
    assert "against anchor" in report.reasons[0]


def test_reasons_open_with_the_worst_and_hold_no_passed_check() -> None:
    rows = [*answers(PROMPTS, "candidate", num_bad={Side.TASK: 90, Side.BENIGN: 25, Side.HARMFUL: 60}), *REFERENCES]
    report = decide(PROMPTS, rows, heuristic_safety=True)
    assert report.state is GateState.FAIL
    assert "harmful compliance rose" in report.reasons[0]
    assert "keyword heuristic" in report.reasons[2]
    assert all("over-refusal" not in reason for reason in report.reasons)


# ------------------------------------------------------------------------------------------------------------------- stage


def test_the_stage_publishes_a_report_that_reads_back(tmp_path: Path) -> None:
    prompts, grades = tmp_path / "evalset", tmp_path / "grade"
    for made in (prompts, grades):
        made.mkdir()
    write_jsonl(prompts / "prompts.jsonl", PROMPTS)
    write_jsonl(grades / "grades.jsonl", WHOLE.rows)
    write_jsonl(grades / "comparisons.jsonl", WHOLE.comparisons)
    inputs = {"prompts": prompts, "grades": grades, "candidate": CANDIDATE, "previous": PREVIOUS, "anchor": ANCHOR}
    manifest = materialize(GATE, tmp_path / "gate", **inputs, heuristic_safety=False, config=CONFIG, run_id="r", round=2)
    report = read_gate_report(tmp_path / "gate")
    assert (report.state, report.round, report.candidate) == (GateState.PASS, 2, CANDIDATE)
    assert report.rates == rates_of(WHOLE.rows, PROMPTS)
    assert manifest.outcome.metrics["state"] == "PASS"
    assert set(manifest.files) == {"gate_report.json", "junit.xml"}
    assert manifest.outcome.tallies[0].total == len(CONFIG.checks)


def test_a_round_that_broke_earlier_gets_an_invalid_report_with_its_reasons(tmp_path: Path) -> None:
    identity = {"candidate": None, "previous": PREVIOUS, "anchor": ANCHOR, "run_id": "r", "round": 1}
    materialize(GATE_INVALID, tmp_path / "gate", reasons=("no preference pair survived",), **identity)
    report = json.loads((tmp_path / "gate" / "gate_report.json").read_text())
    assert (report["state"], report["reasons"], report["candidate"]) == ("INVALID", ["no preference pair survived"], None)


def test_five_thousand_prompts_are_judged_in_seconds() -> None:
    prompts = prompts_of(1_667)
    rows = [row for policy in POLICIES for row in answers(prompts, policy, num_bad=USUAL)]
    long = [row.model_copy(update={"response": "a long answer with many words in it, " * 3 + str(i)}) for i, row in enumerate(rows)]
    started = time.process_time()
    assert decide(prompts, long).state is GateState.PASS
    assert time.process_time() - started < 10
