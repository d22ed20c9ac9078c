"""What `dpo-loop show RUN ROUND` tells about the judge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, materialize, sha256_file
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState, StageOutcome
from flows.show import broken_links, judge_table
from tests.flows.runs import gate_report, publish, started_run


def judged(run: RunDir, round_number: int, **metrics: Any) -> None:
    def stage(out: Path, *, metrics: dict[str, Any]) -> StageOutcome:
        return StageOutcome(metrics=metrics)

    materialize(Stage("judge", 1, stage), run.round(round_number).stage("judge"), metrics=metrics)


def rows(run: RunDir, round_number: int) -> dict[str, list[str]]:
    table = judge_table(run, round_number)
    assert table is not None
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    return {name: list(others) for name, *others in zip(*cells, strict=True)}


def test_live_figures_stand_beside_those_of_the_round_before(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    agreement = {"gpt and claude": {"num": 40, "agree": 0.9, "kappa": 0.8}}
    judged(run, 1, **{"yield": 0.5}, consistency=0.9, length_slope=None, agreement=agreement)
    judged(run, 2, **{"yield": 0.25}, consistency=0.95, length_slope=0.1, agreement=agreement | {"a and b": {"kappa": None}})
    first, second = rows(run, 1), rows(run, 2)
    assert first["yield"] == ["0.500", "–", "–"]
    assert second["yield"] == ["0.250", "0.500", "-0.250"]
    assert second["consistency"] == ["0.950", "0.900", "+0.050"]
    assert second["length slope"] == ["0.100", "–", "–"]
    assert second["kappa of gpt and claude"] == ["0.800", "0.800", "+0.000"]
    assert second["kappa of a and b"] == ["–", "–", "–"]
    assert judge_table(run, 3) is None


def test_reports_of_the_gate_are_chained_and_a_changed_one_is_told(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    sha256 = None
    for number in (1, 2, 3):
        report = gate_report(number, GateState.PASS).model_copy(update={"previous_report_sha256": sha256})
        publish(run.round(number).stage("gate"), {"gate_report.json": report.model_dump_json()})
        sha256 = sha256_file(run.round(number).gate_report)
    assert broken_links(run) == []
    changed = run.round(2).gate_report
    changed.chmod(0o644)
    changed.write_text(changed.read_text().replace("because it is PASS", "because I say so"))
    [told] = broken_links(run)
    assert "report of round 3 follows" in told
