"""The gate's result as JUnit XML, which every CI system draws: the decision itself is the test case `gate`, then one case a check.

A check that a person waived is skipped, with the remark who did; what the waiver makes of the round is in the case `gate`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree as xml

from dpo_loop.files import write_text
from dpo_loop.types import CheckResult, GateReport, GateState

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""https://www.w3.org/TR/xml/#charsets"""


class _Case(NamedTuple):
    """element: None where it passed."""

    group: str
    name: str
    element: str | None
    state: GateState
    why: str


def write_junit(path: Path, report: GateReport) -> None:
    cases = [
        _case("gate", "gate", report.state, "; ".join(report.reasons)),
        *(_case("gate.validity", str(r["id"]), GateState(r["state"]), str(r["why"])) for r in report.validity),
        *map(_case_of_check, report.checks),
    ]
    elements = [case.element for case in cases]
    suite = xml.Element(
        "testsuite",
        name=_plain(f"gate of {report.run_id}, round {report.round}"),
        tests=str(len(cases)),
        failures=str(elements.count("failure")),
        errors=str(elements.count("error")),
        skipped=str(elements.count("skipped")),
        timestamp=_plain(report.created_at),
    )
    for case in cases:
        made = xml.SubElement(suite, "testcase", classname=case.group, name=_plain(case.name))
        if case.element is None:
            xml.SubElement(made, "system-out").text = _plain(case.why)
        else:
            xml.SubElement(made, case.element, message=_plain(case.why), type=case.state.value)
    write_text(path, xml.tostring(suite, encoding="utf-8", xml_declaration=True).decode())


def _case_of_check(check: CheckResult) -> _Case:
    if check.waived_by is None:
        return _case("gate.checks", check.id, check.state, check.why)
    return _Case("gate.checks", check.id, "skipped", check.state, f"{check.why} (waived by {check.waived_by})")


def _case(group: str, name: str, state: GateState, why: str) -> _Case:
    element = None if state is GateState.PASS else "error" if state is GateState.INVALID else "failure"
    return _Case(group, name, element, state, why)


def _plain(text: str) -> str:
    """Without the characters that XML cannot hold, whatever a name or a prompt contains."""
    return _NOT_IN_XML.sub("\ufffd", text)
