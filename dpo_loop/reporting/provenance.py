"""Where the figures of a page come from, and how to get them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from dpo_loop.exchange import GATE_REPORT
from dpo_loop.types import GateReport


def hashes_of(gate: GateReport | None, gate_sha256: str | None, *, of_run: bool) -> list[tuple[str, str]]:
    """(what, sha256), those that are known."""
    if gate is None:
        return []
    named = [
        ("gate report of this round" if of_run else "gate report", gate_sha256),
        ("gate report of the round before", gate.previous_report_sha256),
        ("config of the gate", gate.config_sha256),
        *((f"prompts of {prompts.source}", prompts.sha256) for prompts in gate.prompt_sets),
    ]
    return [(name, value) for name, value in named if value]


def versions_of(gate: GateReport | None, recorded: Mapping[str, str]) -> dict[str, str]:
    """Packages by name: those that made the stages of the round, and those that the policies answered with."""
    said = gate.conditions.get("versions") if gate else None
    return dict(sorted({**recorded, **(said if isinstance(said, dict) else {})}.items()))


def reproduce_commands(
    run_dir: str | None, round_number: int, *, has_gate: bool, given: Sequence[str] = ()
) -> list[tuple[str, str]]:
    """(what it does, command). run_dir None: of rows that belong to no run; the report lies beside the page. given: what makes the page again."""
    again = [("make the gate report and this page again", command) for command in given]
    if run_dir is None:
        beside = (
            "in the folder of this page: the hash of the gate report, to compare with the one above",
            f"sha256sum {GATE_REPORT}",
        )
        return [*([beside] if has_gate else []), *again]
    run = shlex.quote(run_dir)
    report = f"{run}/rounds/{round_number:03d}/gate/{GATE_REPORT}"
    step = [
        (
            "whether the published gate report is still that of its inputs; nothing is made anew where it is",
            f"dpo-loop step gate --run {run} --round {round_number}",
        ),
        ("the hash of the gate report, to compare with the one above", f"sha256sum {report}"),
    ]
    return [
        ("all figures as JSON, with the gate report", f"dpo-loop show {run} {round_number} --json"),
        *(step if has_gate else []),
        *again,
    ]
