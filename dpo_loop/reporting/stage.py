"""The report stage: reads what the other stages published and writes one page. Any input may be None: that stage did not happen."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, read_manifest, sha256_file
from dpo_loop.exchange import (
    ALARMS,
    COMPARISONS,
    GATE_REPORT,
    GRADES,
    METRICS,
    read_comparisons,
    read_gate_report,
    read_grades,
    read_prompts,
)
from dpo_loop.files import write_text
from dpo_loop.progress import say
from dpo_loop.reporting.answers import Case, cases_of
from dpo_loop.reporting.health import StageFigures
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.types import RoundSummary, StageManifest, StageOutcome, Tally

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
    more_prompts: Path | None = None,
    more_grades: Path | None = None,
    redact: bool = True,
) -> StageOutcome:
    """more_prompts, more_grades: the reserve, where the gate asked it too. redact False: see `samples.samples_of`."""
    cases = [*_cases(prompts, grades), *_cases(more_prompts, more_grades)]
    samples = samples_of(cases, redact=redact)
    made = dict(_manifests(judging=judgements, pairing=pairs, training=train, grading=grades, gate=gate))
    data = RoundData(
        run_id=run_id,
        run_dir=_as_typed(out.parents[2]),
        round=round,
        gate=None if gate is None else read_gate_report(gate),
        gate_sha256=None if gate is None else sha256_file(gate / GATE_REPORT),
        history=history,
        seconds=seconds,
        stages=tuple(StageFigures(name, m.outcome, m.key, m.version, m.finished_at) for name, m in made.items()),
        versions={package: version for m in made.values() for package, version in m.versions.items()},
        training=_rows(train, METRICS),
        alarms=_rows(train, ALARMS),
        nll_weight=_nll_weight(made.get("training")),
        loss=_loss(made.get("training")),
        answers_files=tuple(_as_typed(path / GRADES) for path in (grades, more_grades) if path is not None),
        cases=cases,
        samples=samples,
    )
    page = render_report(data)
    write_text(out / PAGE, page)
    say(f"report: {len(samples.shown)} of {samples.total} samples, {len(page.encode()) / 1e6:.2f} MB")
    parts = {"shown": len(samples.shown), "left out for size": samples.num_left_out, "sealed": samples.num_sealed}
    return StageOutcome(
        tallies=(Tally(of="samples", total=samples.total, parts=parts),), metrics={"size_bytes": len(page.encode())}
    )


REPORT = Stage("report", 5, _report)


def _as_typed(path: Path) -> str:
    """As a person in the current directory types it."""
    relative = os.path.relpath(path)
    return str(path.resolve()) if relative.startswith("..") else relative


def _cases(prompts: Path | None, grades: Path | None) -> list[Case]:
    if prompts is None or grades is None:
        return []
    compared = read_comparisons(grades) if (grades / COMPARISONS).is_file() else ()
    return cases_of(read_prompts(prompts), read_grades(grades), compared)


def _manifests(**stages: Path | None) -> Iterator[tuple[str, StageManifest]]:
    for name, path in stages.items():
        manifest = None if path is None else read_manifest(path)
        if manifest is not None:
            yield name, manifest


def _config(training: StageManifest | None) -> dict[str, Any]:
    """As the training was configured; empty where its manifest does not say."""
    config = {} if training is None else training.inputs.get("config")
    return config if isinstance(config, dict) else {}


def _nll_weight(training: StageManifest | None) -> float | None:
    weight = _config(training).get("nll_weight")
    return float(weight) if isinstance(weight, int | float) else None


def _loss(training: StageManifest | None) -> dict[str, Any] | None:
    loss = _config(training).get("loss")
    return loss if isinstance(loss, dict) and "kind" in loss else None


def _rows(train: Path | None, name: str) -> list[dict[str, Any]]:
    """Empty for a training of a version that did not write the file."""
    path = None if train is None else train / name
    if path is None or not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
