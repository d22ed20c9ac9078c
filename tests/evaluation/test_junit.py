"""The gate's result as CI systems read it."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from dpo_loop.evaluation.junit import write_junit
from dpo_loop.types import GateState, Side
from tests.evaluation.rounds import answers, decide, prompts_of


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
    assert int(suite.get("tests", "0")) == len(report.checks) + len(report.validity) == len(cases)
    failed = [check.id for check in report.checks if check.state is not GateState.PASS]
    assert int(suite.get("failures", "0")) == len(failed) > 0
    failure = cases[hostile.id].find("failure")
    assert failure is not None
    assert failure.get("type") == hostile.state.value
    assert failure.get("message") == "]]> <script> \ufffd \ufffd[31m \u202e & done"
