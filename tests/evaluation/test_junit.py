"""The gate's result as CI systems read it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.evaluation.junit import write_junit
from dpo_loop.evaluation.stage import GATE_INVALID
from dpo_loop.types import GateReport, GateState, Side
from tests.evaluation.rounds import ANCHOR, PREVIOUS, answers, decide, prompts_of


def suite_of(folder: Path, report: GateReport) -> ElementTree.Element:
    write_junit(folder / "junit.xml", report)
    return ElementTree.parse(folder / "junit.xml").getroot()


def element_of(suite: ElementTree.Element, name: str) -> ElementTree.Element:
    """What is inside the one case of that name."""
    [case] = [case for case in suite if case.get("name") == name]
    [inside] = case
    return inside


def test_every_check_is_a_case_and_hostile_text_is_only_text(tmp_path: Path) -> None:
    prompts = prompts_of(210)
    rows = [
        *answers(prompts, "candidate", num_bad={Side.HARMFUL: 60}),
        *answers(prompts, "previous"),
        *answers(prompts, "anchor"),
    ]
    report = decide(prompts, rows)
    hostile = report.checks[0].model_copy(update={"why": "]]> <script> \x00 \x1b[31m \u202e & done"})
    report = report.model_copy(update={"checks": (hostile, *report.checks[1:])})
    write_junit(tmp_path / "junit.xml", report)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    cases = {case.get("name"): case for case in suite}
    assert int(suite.get("tests", "0")) == 1 + len(report.checks) + len(report.validity) == len(cases)
    failed = [check.id for check in report.checks if check.state is not GateState.PASS]
    assert int(suite.get("failures", "0")) == 1 + len(failed) > 1
    assert element_of(suite, "gate").get("message") == "; ".join(report.reasons)
    failure = cases[hostile.id].find("failure")
    assert failure is not None
    assert failure.get("type") == hostile.state.value
    assert failure.get("message") == "]]> <script> \ufffd \ufffd[31m \u202e & done"


def test_a_round_that_could_not_be_judged_is_an_error_and_not_an_empty_green_suite(tmp_path: Path) -> None:
    inputs = {"reasons": ("train: loss is NaN", "no adapter"), "candidate": None, "previous": PREVIOUS, "anchor": ANCHOR}
    materialize(GATE_INVALID, tmp_path / "gate", **inputs, run_id="r", round=1)
    suite = ElementTree.parse(tmp_path / "gate" / "junit.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("1", "0", "1")
    error = element_of(suite, "gate")
    assert (error.tag, error.get("type"), error.get("message")) == ("error", "INVALID", "train: loss is NaN; no adapter")


@pytest.mark.parametrize(
    ("state", "tag", "failures"), [(GateState.PASS, "system-out", "0"), (GateState.NEEDS_REVIEW, "failure", "1")]
)
def test_a_waived_check_is_skipped_and_the_decision_has_a_case_of_its_own(
    tmp_path: Path, state: GateState, tag: str, failures: str
) -> None:
    prompts = prompts_of(210)
    report = decide(prompts, [row for policy in ("candidate", "previous", "anchor") for row in answers(prompts, policy)])
    waived = report.checks[0].model_copy(
        update={"state": GateState.FAIL, "why": "broken", "waived_by": "Ada, up to round 3: known"}
    )
    report = report.model_copy(update={"checks": (waived, *report.checks[1:]), "state": state, "reasons": ("so it is",)})
    suite = suite_of(tmp_path, report)
    assert (suite.get("failures"), suite.get("errors"), suite.get("skipped")) == (failures, "0", "1")
    skipped = element_of(suite, waived.id)
    assert (skipped.tag, skipped.get("message")) == ("skipped", "broken (waived by Ada, up to round 3: known)")
    decision = element_of(suite, "gate")
    assert (decision.tag, decision.text or decision.get("message")) == (tag, "so it is")


def test_names_and_reasons_of_any_characters_are_xml(tmp_path: Path) -> None:
    """Controls, halves of surrogate pairs, and the two non-characters that XML 1.0 leaves out of the plane that it knows best."""
    bad, good = "\x00\x0b\x1f\ud800\udfff\ufffe\uffff", '\t\n é\ud7ff\ue000\ufffd\U00010000\U0010ffff<&"'
    prompts = prompts_of(1)
    report = decide(prompts, answers(prompts, "candidate"))
    broken = {"id": bad + good, "state": "INVALID", "why": bad + good}
    report = report.model_copy(update={"run_id": bad, "reasons": (bad + good,), "validity": (broken,)})
    suite = suite_of(tmp_path, report)
    named = "\ufffd" * len(bad) + good
    assert suite.get("name") == "gate of " + "\ufffd" * len(bad) + ", round 1"
    assert [case.get("name") for case in suite] == ["gate", named]
    assert element_of(suite, named).get("message") == element_of(suite, "gate").get("message") == named
