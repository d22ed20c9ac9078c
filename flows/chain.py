"""The gate reports of a run are a chain: each names the hash of the one before it, so none is changed or taken out unnoticed."""

from __future__ import annotations

from dpo_loop.artifacts import sha256_file
from dpo_loop.exchange import read_gate_report
from dpo_loop.files import read_json
from dpo_loop.layout import RunDir
from dpo_loop.types import RoundManifest

_FIRST_WITH_A_PREDECESSOR = 2
"""Round 0 has no gate."""
_WAY_OUT = "Compare with a backup before you rely on this run."


def broken_links(run: RunDir) -> list[str]:
    """A sentence for every round whose report is gone, or does not name the report of the round before as it is now; empty where all do."""
    return [problem for here in run.rounds() if (problem := broken_link(run, here.number)) is not None]


def broken_link(run: RunDir, round_number: int) -> str | None:
    """Of one round; None where its report is whole and in its place, or still to come."""
    here, before = run.round(round_number), run.round(round_number - 1)
    if not here.gate_report.is_file():
        had_one = here.manifest.is_file() and read_json(here.manifest, RoundManifest).gate is not None
        return f"round {round_number} has ended, and its gate report is gone: it was taken out. {_WAY_OUT}" if had_one else None
    if round_number == 0:
        return None
    named = read_gate_report(here.stage("gate")).previous_report_sha256
    if named is None:
        if round_number < _FIRST_WITH_A_PREDECESSOR:
            return None
        return (
            f"the gate report of round {round_number} names no report of round {before.number}: it was put there afterwards, or an older dpo-loop made "
            f"it. {_WAY_OUT}"
        )
    follows = f"the gate report of round {round_number} follows report {named[:12]} of round {before.number}"
    if not before.gate_report.is_file():
        return f"{follows}, and there is none: it was taken out. {_WAY_OUT}"
    if named != sha256_file(before.gate_report):
        return f"{follows}, and the one that is there is another: the file was changed after the fact. {_WAY_OUT}"
    return None
