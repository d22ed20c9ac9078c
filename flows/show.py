"""Tables and JSON of a run for people and machines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_loop.artifacts import read_manifest
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_gate_report
from dpo_loop.layout import RunDir
from dpo_loop.types import GateReport, GateState, RoundSummary
from flows.approval import how_to_decide
from flows.chain import broken_links
from flows.failures import read_failure
from flows.rounds import RoundState, current_policy, is_made, next_round, state_of
from flows.steps import planned_stages, read_run_config, stages_of
from flows.summary import row_of, summaries

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_COLOURS = {
    GateState.PASS: "green",
    GateState.FAIL: "red",
    GateState.INVALID: "red",
    GateState.NEEDS_REVIEW: "yellow",
    GateState.INCONCLUSIVE: "yellow",
}


_JUDGE_FIGURES = ("yield", "consistency", "first_position_win_rate", "tie_rate", "longer_win_rate", "length_slope")


def rate(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def interval(value: float | None, ci: tuple[float, float] | None) -> str:
    return rate(value) if value is None or ci is None else f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]"


def run_json(run: RunDir, round_number: int | None = None) -> str:
    """The one line that other programs read: {"rounds": [...]}, round 0 first; report paths absolute. Of one round also its gate report, null where
    there is none."""
    told: dict[str, Any] = {"rounds": [_absolute_report(run, row) for row in summaries(run)]}
    if round_number is not None:
        gate_dir = run.round(round_number).stage("gate")
        told["gate_report"] = read_gate_report(gate_dir).model_dump(mode="json") if read_manifest(gate_dir) else None
    return json.dumps(told)


def _absolute_report(run: RunDir, row: RoundSummary) -> dict[str, Any]:
    report = None if row.report is None else str((run.path / row.report).absolute())
    return {**row.model_dump(mode="json"), "report": report}


def policy_word(run: RunDir, row: RoundSummary) -> str:
    """What became of a round's policy; of a round that has not ended, how far it is."""
    state = state_of(run, row.round)
    if state is not RoundState.FINISHED:
        return state.value
    return "start" if row.round == 0 else "promoted" if row.promoted else "kept"


def rounds_table(run: RunDir, rows: tuple[RoundSummary, ...], *, title: str | None = None) -> Table:
    """Where the anchor was moved, its round stands beside the win rate: rates against different anchors are not one series."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for heading in ("round", "pairs", "pass rate", "win vs previous", "win vs anchor", "harmful", "over-refusal", "gate", "policy"):
        table.add_column(heading, justify="left" if heading in ("gate", "policy") else "right", no_wrap=heading == "round")
    for row in rows:
        gate = "–" if row.gate is None else f"[{_COLOURS[row.gate]}]{row.gate.value}[/]"
        table.add_row(
            str(row.round),
            "–" if row.num_pairs is None else str(row.num_pairs),
            rate(row.pass_rate),
            interval(row.win_rate_previous, row.win_rate_previous_ci),
            interval(row.win_rate_anchor, row.win_rate_anchor_ci) + (f" (round {row.anchor_round})" if row.anchor_round else ""),
            rate(row.harmful_rate),
            rate(row.over_refusal_rate),
            gate,
            policy_word(run, row),
        )
    return table


def seconds_table(rows: tuple[RoundSummary, ...]) -> Table:
    from rich.table import Table

    names = list(dict.fromkeys(name for row in rows for name in row.seconds))
    table = Table(title="seconds per stage", title_justify="left")
    for heading in ("round", *names, "all"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (f"{row.seconds[name]:.1f}" if name in row.seconds else "–" for name in names)
        table.add_row(str(row.round), *cells, f"{sum(row.seconds.values()):.1f}")
    return table


def print_run(console: Console, run: RunDir) -> None:
    rows = summaries(run)
    console.print(rounds_table(run, rows, title=f"run {read_run_config(run).run_id}"))
    console.print(seconds_table(rows))
    for row in rows:
        if row.gate not in (None, GateState.PASS):
            for reason in row.reasons:
                console.print(f"round {row.round}: {reason}", markup=False, highlight=False, soft_wrap=True)
    for link in broken_links(run):
        console.print(link, markup=False, highlight=False, soft_wrap=True)
    if run.index_page.is_file():
        console.print(f"report: {run.index_page}", markup=False, highlight=False, soft_wrap=True)
    waiting = next_round(run)
    if state_of(run, waiting) is RoundState.WAITING:
        console.print(
            f"round {waiting} waits for a person:\n{how_to_decide(run, waiting)}", markup=False, highlight=False, soft_wrap=True
        )


def print_round(console: Console, run: RunDir, round_number: int) -> None:
    """One round in detail: its row, the counts of each stage, the checks of its gate."""
    from rich.markup import escape
    from rich.table import Table

    if state_of(run, round_number) is RoundState.NEW:
        raise InputError(f"{run.path} has no round {round_number}; it has rounds 0 to {len(run.rounds()) - 1}")
    row = row_of(run, round_number)
    console.print(rounds_table(run, (row,), title=f"round {round_number}"))
    stages = Table(title="stages", title_justify="left")
    for heading in ("stage", "seconds", "counts", "figures"):
        stages.add_column(heading, justify="right" if heading == "seconds" else "left")
    for name in stages_of(read_run_config(run), round_number):
        manifest = read_manifest(run.round(round_number).stage(name))
        if manifest is None:
            continue
        counts = "; ".join(
            f"{t.total} {t.of} = " + " + ".join(f"{n} {part}" for part, n in t.parts.items() if n) for t in manifest.outcome.tallies
        )
        figures = ", ".join(
            f"{n} {_short(value)}" for n, value in manifest.outcome.metrics.items() if isinstance(value, int | float | str)
        )
        stages.add_row(name, f"{manifest.seconds:.1f}", escape(counts), escape(figures))
    console.print(stages)
    if (judge := judge_table(run, round_number)) is not None:
        console.print(judge)
    gate_dir = run.round(round_number).stage("gate")
    if read_manifest(gate_dir):
        report = read_gate_report(gate_dir)
        console.print(validity_table(report))
        console.print(checks_table(report))
    for reason in row.reasons:
        console.print(reason, markup=False, highlight=False, soft_wrap=True)


def validity_table(report: GateReport) -> Table:
    """What shows that the evaluation itself is sound."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="is the evaluation sound?", title_justify="left")
    for heading in ("what", "state", "why"):
        table.add_column(heading)
    for found in report.validity:
        state = GateState(found["state"])
        table.add_row(str(found["id"]).replace("_", " "), f"[{_COLOURS[state]}]{state.value}[/]", escape(str(found["why"])))
    return table


def checks_table(report: GateReport) -> Table:
    from rich.markup import escape
    from rich.table import Table

    checks = Table(title="checks", title_justify="left")
    for heading in ("check", "state", "value", "reference", "difference", "margin", "smallest seen", "why"):
        checks.add_column(heading)
    for check in report.checks:
        ci = None if check.ci_low is None or check.ci_high is None else (check.ci_low, check.ci_high)
        checks.add_row(
            check.id,
            f"[{_COLOURS[check.state]}]{check.state.value}[/]" + (" (waived)" if check.waived_by else ""),
            rate(check.value),
            rate(check.reference),
            interval(check.delta if check.delta is not None else check.value, ci),
            rate(check.margin),
            rate(check.mde),
            escape(check.why),
        )
    return checks


def judge_table(run: RunDir, round_number: int) -> Table | None:
    """The judge's live figures beside those of the round before, None where nothing was judged."""
    from rich.table import Table

    manifests = [read_manifest(run.round(number).stage("judge")) for number in (round_number, round_number - 1) if number > 0]
    if not manifests or manifests[0] is None:
        return None
    now, before = [_judge_figures(manifest.outcome.metrics) if manifest else {} for manifest in (*manifests, None)][:2]
    table = Table(title="judge", title_justify="left")
    for heading in ("figure", "this round", "round before", "change"):
        table.add_column(heading, justify="left" if heading == "figure" else "right")
    for name, one in now.items():
        other = before.get(name)
        change = f"{one - other:+.3f}" if one is not None and other is not None else "–"
        table.add_row(name, rate(one), rate(other), change)
    return table


def _judge_figures(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """By what they are called here; of a panel also how far its judges agree, beyond chance."""
    own = {name.replace("_", " "): metrics.get(name) for name in _JUDGE_FIGURES}
    return own | {f"kappa of {pair}": said["kappa"] for pair, said in metrics.get("agreement", {}).items()}


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_status(run: RunDir) -> dict[str, Any]:
    """Where a run stands now, from its files alone."""
    config = read_run_config(run)
    number = next_round(run)
    state = state_of(run, number)
    status: dict[str, Any] = {
        "run_id": config.run_id,
        "rounds_asked": config.rounds,
        "rounds_finished": max(number - 1, 0),
        "policy_of_round": current_policy(run).round if run.current.is_file() else None,
        "player_pid": _player(run),
        "round": None if state is RoundState.NEW else number,
        "round_state": None if state is RoundState.NEW else state.value,
        "stage": None,
        "last_line": None,
        "failures": {},
    }
    if state is RoundState.PLAYING:
        here = run.round(number)
        left = () if is_made(run, number) else planned_stages(run, number)
        todo = [name for name in left if read_manifest(here.stage(name)) is None]
        status["stage"] = todo[0] if todo else None
        if todo and (log := run.log(number, todo[0])).is_file():
            status["last_line"] = _last_line(log)
            status["log_age_s"] = round(time.time() - log.stat().st_mtime, 1)
        found = ((name, read_failure(here, name)) for name in stages_of(config, number))
        status["failures"] = {name: failure.message for name, failure in found if failure is not None}
        if not todo:
            status["next"] = "every stage is made; the command that plays this run ends the round"
    if state is RoundState.WAITING:
        status["decide"] = how_to_decide(run, number).splitlines()
    return status


def _last_line(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode("utf-8", "replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def _player(run: RunDir) -> int | None:
    """Pid of the process that plays the run, None if nobody does."""
    import fcntl

    if not run.lease.is_file():
        return None
    with run.lease.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read().strip()
            return int(text) if text.isdigit() else os.getpid()
    return None
