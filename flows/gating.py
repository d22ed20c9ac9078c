"""`dpo-loop gate`: the gate alone, over graded answers made by anybody.

A row is one answer of one policy: {"prompt_id", "side", "policy", "response", "grade"} and, where there are any, "category", "cluster_id", "prompt"
(its text, which shows an answer that only repeats it), "finish_reason" (`stop` or `length`), "severity" (1 to 3), "sealed" (true: its id and text stay out of reasons and page) and "rationale" (of its judge). Other keys are passed over.
What a row says of its prompt holds for all rows of that prompt; it may be left out of some, and two that contradict each other are refused.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import click
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from dpo_loop.artifacts import sha256_file
from dpo_loop.config import GateConfig
from dpo_loop.errors import ConfigError, InputError
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.decision import judge_candidate
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.junit import write_junit
from dpo_loop.exchange import GATE_REPORT, JUNIT
from dpo_loop.files import write_json, write_text
from dpo_loop.types import Comparison, FinishReason, GateReport, Grade, GradeRow, Message, PolicyName, PolicyRef, Prompt, Side
from flows.config import read_raw

MOST_LISTED = 20
Read = TypeVar("Read")


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
    sealed: Literal["", "true"] = ""
    rationale: str = ""

    @field_validator("severity", "sealed", mode="before")
    @classmethod
    def _as_a_word(cls, value: Any) -> Any:
        if isinstance(value, bool):
            return "true" if value else ""
        return str(value) if isinstance(value, int) else value

    @field_validator("prompt_id")
    @classmethod
    def _of_a_prompt(cls, prompt_id: str) -> str:
        if not prompt_id.strip():
            raise ValueError("it is empty")
        return prompt_id


_OF_THE_PROMPT = ("side", "category", "cluster_id", "prompt", "severity", "sealed")


class _Answer(NamedTuple):
    """number: of its line."""

    number: int
    row: _Row
    graded: GradeRow


@dataclass(frozen=True, slots=True)
class Judged:
    """What was read, and the decision on it."""

    report: GateReport
    prompts: Sequence[Prompt]
    rows: Sequence[GradeRow]
    comparisons: Sequence[Comparison]


def gate_rows(rows: Path, config: Path, out: Path, comparisons: Path | None = None) -> Judged:
    """Writes gate_report.json and junit.xml into `out`. comparisons: JSON lines of {"prompt_id", "vs", "kind", "p_candidate", "ballot_keys"}, for checks
    of the win rate. Raises InputError for lines that are no rows, all of them listed, for rows that disagree about their prompt and for an `out` that
    cannot be written, and ConfigError for a config that is none."""
    gate = _read_config(config)
    prompts, graded = _settled(rows, _read_rows(rows))
    compared = [] if comparisons is None else _read_comparisons(comparisons)
    candidate, previous, anchor = (_policy(rows, name, graded) for name in ("candidate", "previous", "anchor"))
    context = Context(candidate=candidate, previous=previous, anchor=anchor, run_id=rows.stem, round=0)
    report = judge_candidate(Evidence(prompts, graded, compared, alpha=gate.alpha), gate, context)
    with _writing(out):
        write_junit(out / JUNIT, report)
        write_json(out / GATE_REPORT, report)
    return Judged(report, prompts, graded, compared)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise InputError(
            f"--out: nothing can be written into {out}: {error.strerror}; name a folder that is there or can be made"
        ) from error


def write_page(judged: Judged, out: Path, *, rows: Path, config: Path, comparisons: Path | None, redact: bool) -> Path:
    """report.html beside the gate's report in `out`, with the command that makes it again. redact False: answers to harmful prompts are in it, but for the categories that never are."""
    from dpo_loop.reporting.answers import cases_of
    from dpo_loop.reporting.page import RoundData, render_report
    from dpo_loop.reporting.samples import samples_of
    from dpo_loop.reporting.stage import PAGE

    again = ["dpo-loop", "report", "--rows", str(rows), "--config", str(config), "--out", str(out)]
    again += ["--comparisons", str(comparisons)] if comparisons else []
    again += [] if redact else ["--reveal"]
    report = judged.report
    cases = cases_of(judged.prompts, judged.rows, judged.comparisons)
    data = RoundData(
        run_id=report.run_id,
        run_dir=None,
        commands=(shlex.join(again),),
        answers_files=(str(rows),),
        round=report.round,
        gate=report,
        gate_sha256=sha256_file(out / GATE_REPORT),
        cases=cases,
        samples=samples_of(cases, redact=redact),
        index=None,
    )
    with _writing(out):
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


_COMPARISON = (
    'A comparison is {"prompt_id", "vs", "kind", "p_candidate", "ballot_keys"}: vs is previous or anchor, p_candidate 1 for a win of the candidate, '
    "0 for a loss, 0.5 for a tie and null where nobody could decide."
)


def _read_rows(path: Path) -> list[_Answer]:
    def read(line: bytes) -> tuple[_Row, GradeRow]:
        row = _Row.model_validate_json(line)
        kept = row.model_dump(exclude={"prompt", "severity", "sealed"})
        return row, GradeRow(**kept, num_tokens=len(row.response.split()))

    found = _read_lines(path, read, "--rows", str(__doc__).split("\n\n")[1])
    if not found:
        raise InputError(f"--rows: {path} is empty")
    return [_Answer(number, row, graded) for number, (row, graded) in found]


def _read_comparisons(path: Path) -> list[Comparison]:
    return [one for _, one in _read_lines(path, Comparison.model_validate_json, "--comparisons", _COMPARISON)]


def _read_lines(path: Path, read: Callable[[bytes], Read], option: str, wanted: str) -> list[tuple[int, Read]]:
    """What each line is, with its number; a byte order mark and empty lines are passed over. wanted: what a line should be."""
    found, bad = [], []
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((number, read(line)))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            bad.append(f"  line {number}: {f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}")
    if bad:
        noun = "rows" if option == "--rows" else "comparisons"
        raise InputError("\n".join([f"{option}: {path} has {len(bad)} lines that are no {noun}:", *_listed(bad), wanted]))
    return found


def _listed(lines: list[str]) -> list[str]:
    return [*lines[:MOST_LISTED], f"  … and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else lines


def _read_config(path: Path) -> GateConfig:
    """A run's config, of which `gate` is read, or the keys of `gate` alone."""
    raw: Any = read_raw(path)
    raw = raw.get("gate", raw)
    try:
        return GateConfig.model_validate(raw)
    except ValidationError as error:
        where = ((".".join(str(part) for part in each["loc"]) or "gate", each["msg"]) for each in error.errors())
        raise ConfigError([f"--config: {path}: {name}: {problem}" for name, problem in where]) from error


def _settled(path: Path, answers: list[_Answer]) -> tuple[tuple[Prompt, ...], list[GradeRow]]:
    """The prompts, and the rows with what any row said of its prompt. Raises InputError for all prompts about which two rows disagree."""
    told: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: {name: {} for name in _OF_THE_PROMPT})
    for number, row, _ in answers:
        for name, lines in told[row.prompt_id].items():
            if value := str(getattr(row, name)):
                lines.setdefault(value, number)
    if odd := [
        f"  {prompt_id}: {name} is " + " and ".join(f"{_short(value)} in line {number}" for value, number in lines.items())
        for prompt_id, names in told.items()
        for name, lines in names.items()
        if len(lines) > 1
    ]:
        raise InputError("\n".join([f"--rows: {path} contradicts itself about its prompts in {len(odd)} places:", *_listed(odd)]))
    known = {prompt_id: {name: next(iter(lines), "") for name, lines in names.items()} for prompt_id, names in told.items()}
    prompts = tuple(_prompt(prompt_id, of_it) for prompt_id, of_it in known.items())
    same = ("category", "cluster_id")
    return prompts, [
        answer.graded.model_copy(update={name: known[answer.row.prompt_id][name] for name in same}) for answer in answers
    ]


def _short(value: str) -> str:
    return repr(value if len(value) <= 40 else f"{value[:40]}…")


def _prompt(prompt_id: str, told: dict[str, str]) -> Prompt:
    message = Message(role="user", content=told["prompt"] or prompt_id)
    tags = {name: told[name] for name in ("side", "category", "severity", "sealed") if told[name]}
    return Prompt(id=prompt_id, messages=(message,), source="rows", tags=tags)


def _policy(path: Path, name: str, rows: list[GradeRow]) -> PolicyRef:
    """Known by its answers, since nothing else is."""
    said: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        said[row.policy] += [row.prompt_id, row.response]
    digest = hashlib.sha256(json.dumps([name, said[name]]).encode()).hexdigest()
    return PolicyRef(base=path.name, base_sha256="0" * 64, adapter=name, adapter_sha256=digest)
