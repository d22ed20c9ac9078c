"""The index over a run's rounds: lineage, states, rates, a link to each report."""

from __future__ import annotations

import os
from pathlib import Path

from markupsafe import Markup

from dpo_loop.files import write_text
from dpo_loop.reporting.page import TEMPLATES, csp_hash, environment
from dpo_loop.types import RoundSummary


def write_index(path: Path, *, run_id: str, history: tuple[RoundSummary, ...]) -> None:
    """Write index.html atomically. Links are relative to it, so the run directory can move."""
    css = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    rows = [{"row": row, "link": _link(path.parent, row.report), "parent": _parent_round(history, row)} for row in history]
    current = next((row.round for row in reversed(history) if row.promoted), None)
    page = environment().get_template("index.html.j2")
    write_text(path, page.render(run_id=run_id, rows=rows, current=current, css=css, style_hash=csp_hash(css)))


def _link(root: Path, report: str | None) -> str | None:
    if report is None:
        return None
    return os.path.relpath(report, root) if os.path.isabs(report) else report


def _parent_round(history: tuple[RoundSummary, ...], row: RoundSummary) -> int | None:
    """The round whose policy generated this one: the last promoted one before it."""
    return max((other.round for other in history if other.round < row.round and other.promoted), default=None)
