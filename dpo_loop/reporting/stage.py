"""The report stage: reads what the other stages published and writes one page. Any input may be None: that stage did not happen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, read_manifest, sha256_file
from dpo_loop.exchange import GATE_REPORT, METRICS, read_gate_report, read_grades, read_prompts
from dpo_loop.files import write_text
from dpo_loop.progress import say
from dpo_loop.reporting.page import RoundData, StageFigures, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.types import RoundSummary, StageOutcome, Tally

PAGE = "report.html"


def _report(
    out: Path,
    *,
    run_id: str,
    round: int,
    gate: Path | None,
    prompts: Path | None,
    grades: Path | None,
    judgements: Path | None,
    pairs: Path | None,
    train: Path | None,
    history: tuple[RoundSummary, ...],
    seconds: dict[str, float],
) -> StageOutcome:
    shown, total = samples_of(read_prompts(prompts), read_grades(grades)) if prompts and grades else ([], 0)
    data = RoundData(
        run_id=run_id,
        run_dir=_as_typed(out.parents[2]),
        round=round,
        gate=None if gate is None else read_gate_report(gate),
        gate_sha256=None if gate is None else sha256_file(gate / GATE_REPORT),
        history=history,
        seconds=seconds,
        stages=tuple(_figures(judging=judgements, pairing=pairs, training=train, grading=grades)),
        training=_metrics(train),
        samples=shown,
        num_samples=total,
    )
    page = render_report(data)
    write_text(out / PAGE, page)
    say(f"report: {len(shown)} of {total} samples, {len(page.encode()) / 1e6:.2f} MB")
    return StageOutcome(
        tallies=(Tally(of="samples", total=total, parts={"shown": len(shown), "left out for size": total - len(shown)}),),
        metrics={"size_bytes": len(page.encode())},
    )


REPORT = Stage("report", 2, _report)


def _as_typed(run: Path) -> str:
    """The run directory as a person in the current directory types it."""
    relative = os.path.relpath(run)
    return str(run.resolve()) if relative.startswith("..") else relative


def _figures(**stages: Path | None) -> Iterator[StageFigures]:
    for name, path in stages.items():
        manifest = None if path is None else read_manifest(path)
        if manifest is not None:
            yield StageFigures(name, manifest.outcome)


def _metrics(train: Path | None) -> list[dict[str, Any]]:
    path = None if train is None else train / METRICS
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
