"""`dpo-loop gate`: the gate alone, over graded answers made by anybody.

A row is one answer of one policy: {"prompt_id", "side", "policy", "response", "grade"} and, where there are any, "category", "cluster_id", "prompt"
(its text, which shows an answer that only repeats it), "finish_reason" (`stop` or `length`), "severity" (1 to 3) and "rationale" (of its judge). Other keys are passed over.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dpo_loop.artifacts import sha256_file
from dpo_loop.config import GateConfig
from dpo_loop.errors import ConfigError, InputError
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.decision import judge_candidate
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.junit import write_junit
from dpo_loop.exchange import GATE_REPORT, JUNIT
from dpo_loop.files import read_jsonl, write_json, write_text
from dpo_loop.types import Comparison, FinishReason, GateReport, Grade, GradeRow, Message, PolicyName, PolicyRef, Prompt, Side

MOST_LISTED = 20


class _Row(BaseModel):
    model_config = ConfigDict(extra="ignore")
    prompt_id: str
    side: Side
    policy: PolicyName
    response: str
    grade: Grade | None
    category: str = ""
    cluster_id: str = ""
    prompt: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    severity: Literal["", "1", "2", "3"] = ""
    rationale: str = ""

    @field_validator("severity", mode="before")
    @classmethod
    def _as_a_word(cls, severity: Any) -> Any:
        return str(severity) if isinstance(severity, int) else severity


@dataclass(frozen=True, slots=True)
class Judged:
    """What was read, and the decision on it."""

    report: GateReport
    prompts: Sequence[Prompt]
    rows: Sequence[GradeRow]
    comparisons: Sequence[Comparison]


def gate_rows(rows: Path, config: Path, out: Path, comparisons: Path | None = None) -> Judged:
    """Writes gate_report.json and junit.xml into `out`. comparisons: JSON lines of {"prompt_id", "vs", "kind", "p_candidate", "ballot_keys"}, for checks
    of the win rate. Raises InputError for lines that are no rows, all of them listed, and ConfigError for a config that is none."""
    read = _read_rows(rows)
    gate = _read_config(config)
    prompts = tuple({row.prompt_id: _prompt(row) for row in sorted(read, key=lambda row: bool(row.prompt))}.values())
    graded = [_graded(row) for row in read]
    compared = list(read_jsonl(comparisons, Comparison)) if comparisons else []
    candidate, previous, anchor = (_policy(rows, name, read) for name in ("candidate", "previous", "anchor"))
    context = Context(candidate=candidate, previous=previous, anchor=anchor, run_id=rows.stem, round=0)
    report = judge_candidate(Evidence(prompts, graded, compared, alpha=gate.alpha), gate, context)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / GATE_REPORT, report)
    write_junit(out / JUNIT, report)
    return Judged(report, prompts, graded, compared)


def write_page(judged: Judged, out: Path, *, redact: bool) -> Path:
    """report.html beside the gate's report in `out`. redact False: answers to harmful prompts are in it, but for the categories that never are."""
    from dpo_loop.reporting.answers import cases_of
    from dpo_loop.reporting.page import RoundData, render_report
    from dpo_loop.reporting.samples import samples_of
    from dpo_loop.reporting.stage import PAGE

    report = judged.report
    cases = cases_of(judged.prompts, judged.rows, judged.comparisons)
    data = RoundData(
        run_id=report.run_id,
        run_dir=str(out),
        round=report.round,
        gate=report,
        gate_sha256=sha256_file(out / GATE_REPORT),
        cases=cases,
        samples=samples_of(cases, redact=redact),
        index=None,
    )
    write_text(out / PAGE, render_report(data))
    return out / PAGE


def tell(report: GateReport, *, as_json: bool) -> None:
    if as_json:
        click.echo(report.model_dump_json())
        return
    from rich.console import Console

    from flows.show import checks_table, validity_table

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(validity_table(report))
    if report.checks:
        console.print(checks_table(report))
    console.print(f"{report.state.value}: " + "\n".join(report.reasons), markup=False, highlight=False, soft_wrap=True)


def _read_rows(path: Path) -> list[_Row]:
    found, bad = [], []
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"--rows: {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append(_Row.model_validate_json(line))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            bad.append(f"  line {number}: {f'{where}: ' if where else ''}{first['msg']}")
    if bad:
        more = [f"  … and {len(bad) - MOST_LISTED} more"] if len(bad) > MOST_LISTED else []
        raise InputError(
            "\n".join(
                [f"--rows: {path} has {len(bad)} lines that are no rows:", *bad[:MOST_LISTED], *more, str(__doc__).split("\n\n")[1]]
            )
        )
    if not found:
        raise InputError(f"--rows: {path} is empty")
    return found


def _read_config(path: Path) -> GateConfig:
    """A run's config, of which `gate` is read, or the keys of `gate` alone."""
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError([f"--config: {path} cannot be read: {' '.join(str(error).split())}"]) from error
    if isinstance(raw, dict) and "gate" in raw:
        raw = raw["gate"]
    try:
        return GateConfig.model_validate(raw)
    except ValidationError as error:
        where = ((".".join(str(part) for part in each["loc"]) or "gate", each["msg"]) for each in error.errors())
        raise ConfigError([f"--config: {path}: {name}: {problem}" for name, problem in where]) from error


def _prompt(row: _Row) -> Prompt:
    message = Message(role="user", content=row.prompt or row.prompt_id)
    tags = {"side": row.side.value, "category": row.category, "severity": row.severity}
    return Prompt(id=row.prompt_id, messages=(message,), source="rows", tags={name: value for name, value in tags.items() if value})


def _graded(row: _Row) -> GradeRow:
    kept = row.model_dump(exclude={"prompt", "severity"})
    return GradeRow(**kept, num_tokens=len(row.response.split()))


def _policy(path: Path, name: str, rows: list[_Row]) -> PolicyRef:
    """Known by its answers, since nothing else is."""
    said: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        said[row.policy] += [row.prompt_id, row.response]
    digest = hashlib.sha256(json.dumps([name, said[name]]).encode()).hexdigest()
    return PolicyRef(base=path.name, base_sha256="0" * 64, adapter=name, adapter_sha256=digest)
