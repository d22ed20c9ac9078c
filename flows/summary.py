"""One row per round, read from its stages: what `dpo-loop show`, the report and the Prefect artifacts show."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import read_manifest
from dpo_loop.exchange import PAIRS, read_comparisons, read_gate_report, read_grades, read_prompts
from dpo_loop.files import read_json
from dpo_loop.layout import JUDGE_TEST, RunDir
from dpo_loop.policies import read_blessing
from dpo_loop.types import GateReport, GateState, RoundManifest, RoundSummary
from flows.config import RunConfig
from flows.steps import read_run_config, stages_of
from flows.terms import terms_of


def summaries(run: RunDir) -> tuple[RoundSummary, ...]:
    """A row for every round that has begun, in order; report paths relative to the run."""
    return tuple(row_of(run, here.number) for here in run.rounds())


def row_of(run: RunDir, round_number: int) -> RoundSummary:
    """As recorded at the round's end, or as far as it has come."""
    path = run.round(round_number).manifest
    if path.is_file():
        return RoundSummary.model_validate(read_json(path, RoundManifest).summary)
    return summarise(run, round_number, promoted=False)


def history_for_report(run: RunDir, round_number: int) -> tuple[RoundSummary, ...]:
    """All rounds up to and including one whose report is about to be made: before a person decides, and without the report's own time."""
    gate = _gate(run, round_number)
    promoted = round_number == 0 or (gate is not None and gate.state is GateState.PASS)
    own = summarise(run, round_number, promoted=promoted)
    seconds = {name: value for name, value in own.seconds.items() if name != "report"}
    report = str(run.round(round_number).report_page.relative_to(run.path))
    return (
        *(row_of(run, number) for number in range(round_number)),
        own.model_copy(update={"seconds": seconds, "report": report}),
    )


def summarise(run: RunDir, round_number: int, *, promoted: bool) -> RoundSummary:
    """Rates in 0..1, None where a stage did not happen."""
    here = run.round(round_number)
    made = {
        name: manifest
        for name in stages_of(read_run_config(run), round_number)
        if (manifest := read_manifest(here.stage(name))) is not None
    }
    gate = _gate(run, round_number)
    num_pairs = None
    if "pair" in made:
        with (here.stage("pair") / PAIRS).open("rb") as file:
            num_pairs = sum(1 for _ in file)
    return RoundSummary(
        round=round_number,
        parent=read_blessing(here.parent, run=run.path).policy.key if here.parent.is_file() else None,
        gate=None if gate is None else gate.state,
        promoted=promoted,
        num_pairs=num_pairs,
        seconds={name: manifest.seconds for name, manifest in made.items()},
        report=str(here.report_page.relative_to(run.path)) if "report" in made else None,
        reasons=() if gate is None else gate.reasons,
        accepted_judge_risk=made[JUDGE_TEST].outcome.metrics["accepted_risk"] if JUDGE_TEST in made else None,
        anchor_round=terms_of(run, round_number).anchor_round,
        **(_rates(run, round_number) if "grade" in made else _NO_RATES),
    )


def _gate(run: RunDir, round_number: int) -> GateReport | None:
    here = run.round(round_number)
    return read_gate_report(here.stage("gate")) if read_manifest(here.stage("gate")) else None


_NO_RATES: dict[str, Any] = dict.fromkeys(
    ("pass_rate", "harmful_rate", "over_refusal_rate", "degenerate_rate", "win_rate_previous", "win_rate_anchor")
)


def graded_parts(run: RunDir, round_number: int) -> list[tuple[Path, Path]]:
    """(prompts, grades) of what a round was judged on: the evaluation and, where the gate asked it too, the reserve. Empty before it is graded."""
    first, here = run.round(0), run.round(round_number)
    if read_manifest(here.stage("grade")) is None:
        return []
    parts = [(first.stage("evalset"), here.stage("grade"))]
    gate = _gate(run, round_number)
    if gate is not None and gate.topped_up and read_manifest(here.stage("grade_more")) is not None:
        parts.append((first.stage("reserve"), here.stage("grade_more")))
    return parts


def _rates(run: RunDir, round_number: int) -> dict[str, Any]:
    """As the gate counts them, win rates with its intervals: where a second look is possible, each has half of alpha."""
    from dpo_loop.evaluation.rates import rates_of, win_rates_of

    config = read_run_config(run)
    alpha = config.gate.alpha / (2 if config.prompts.eval_reserve > 0 else 1)
    parts = graded_parts(run, round_number)
    grades = chain.from_iterable(read_grades(graded) for _, graded in parts)
    prompts = chain.from_iterable(read_prompts(asked) for asked, _ in parts)
    compared = chain.from_iterable(read_comparisons(graded) for _, graded in parts)
    rates = rates_of(grades, prompts)["candidate"]
    wins = win_rates_of(compared, alpha=alpha) if round_number > 0 else {}
    fields: dict[str, Any] = {name: rates.get(name) for name in _NO_RATES if not name.startswith("win_rate")}
    for vs in ("previous", "anchor"):
        win = wins.get(vs)
        fields[f"win_rate_{vs}"] = None if win is None else win.rate
        fields[f"win_rate_{vs}_ci"] = None if win is None else (win.ci_low, win.ci_high)
    return fields


def write_index_page(run: RunDir, config: RunConfig) -> None:
    """`index.html`: the report over all rounds."""
    from dpo_loop.reporting.index import write_index

    write_index(run.index_page, run_id=config.run_id, history=summaries(run))
