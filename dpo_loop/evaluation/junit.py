"""The gate's result as JUnit XML, which every CI system draws: a test case a check, a failure where it is not PASS."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree as xml

from dpo_loop.types import GateReport, GateState

_ELEMENT = {
    GateState.FAIL: "failure",
    GateState.INVALID: "error",
    GateState.NEEDS_REVIEW: "failure",
    GateState.INCONCLUSIVE: "failure",
}


def write_junit(path: Path, report: GateReport) -> None:
    validity = [("validity", str(result["id"]), GateState(result["state"]), str(result["why"])) for result in report.validity]
    checks = [("checks", check.id, check.state, check.why) for check in report.checks]
    cases = [*validity, *checks]
    bad = [state for _, _, state, _ in cases if state is not GateState.PASS]
    suite = xml.Element(
        "testsuite",
        name=f"gate of {report.run_id}, round {report.round}",
        tests=str(len(cases)),
        failures=str(sum(_ELEMENT[state] == "failure" for state in bad)),
        errors=str(sum(_ELEMENT[state] == "error" for state in bad)),
        timestamp=report.created_at,
    )
    for group, name, state, why in cases:
        case = xml.SubElement(suite, "testcase", classname=f"gate.{group}", name=name)
        if state is GateState.PASS:
            xml.SubElement(case, "system-out").text = _plain(why)
        else:
            xml.SubElement(case, _ELEMENT[state], message=_plain(why), type=state.value)
    xml.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)


def _plain(text: str) -> str:
    """Without the control characters that XML cannot hold, whatever a name of a prompt contains."""
    return "".join(sign if sign >= " " or sign in "\t\n" else "\ufffd" for sign in text)
