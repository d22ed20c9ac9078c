"""Where the figures of a page come from, and how to get them again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from dpo_loop.types import GateReport


def hashes_of(gate: GateReport | None, gate_sha256: str | None) -> list[tuple[str, str]]:
    """(what, sha256), those that are known."""
    if gate is None:
        return []
    named = [
        ("gate report of this round", gate_sha256),
        ("gate report of the round before", gate.previous_report_sha256),
        ("config of the gate", gate.config_sha256),
        *((f"prompts of {prompts.source}", prompts.sha256) for prompts in gate.prompt_sets),
    ]
    return [(name, value) for name, value in named if value]


def versions_of(gate: GateReport | None, recorded: Mapping[str, str]) -> dict[str, str]:
    """Packages by name: those that made the stages of the round, and those that the policies answered with."""
    said = gate.conditions.get("versions") if gate else None
    return dict(sorted({**recorded, **(said if isinstance(said, dict) else {})}.items()))


def reproduce_commands(run_dir: str, round_number: int, *, has_gate: bool) -> list[tuple[str, str]]:
    """(what it does, command)."""
    run = shlex.quote(run_dir)
    report = f"{run}/rounds/{round_number:03d}/gate/gate_report.json"
    step = [
        ("check that the gate's files are what was decided on", f"dpo-loop step gate --run {run} --round {round_number}"),
        ("compare the hash of the gate report", f"sha256sum {report}"),
    ]
    return [
        ("all figures as JSON, with the gate report", f"dpo-loop show {run} {round_number} --json"),
        *(step if has_gate else []),
    ]
