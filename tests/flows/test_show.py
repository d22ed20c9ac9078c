"""What `dpo-loop show RUN ROUND` tells about the judge."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import Stage, materialize, sha256_file
from dpo_loop.layout import RunDir
from dpo_loop.types import Comparison, GateReport, GateState, StageOutcome, VerdictKind
from flows.chain import broken_link, broken_links
from flows.show import judge_table, rounds_table, run_json
from flows.strengths import lines_of, strengths_of
from flows.summary import row_of
from flows.terms import rebase
from tests.flows.runs import gate_report, played_round, publish, started_run


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


def chained(path: Path, num_rounds: int) -> RunDir:
    run = started_run(path)
    sha256 = None
    for number in range(1, num_rounds + 1):
        report = gate_report(number, GateState.PASS).model_copy(update={"previous_report_sha256": sha256})
        publish(run.round(number).stage("gate"), {"gate_report.json": report.model_dump_json()})
        sha256 = sha256_file(run.round(number).gate_report)
    return run


def test_reports_of_the_gate_are_chained_and_a_changed_one_is_told(tmp_path: Path) -> None:
    run = chained(tmp_path / "run", 3)
    assert broken_links(run) == []
    changed = run.round(2).gate_report
    changed.chmod(0o644)
    changed.write_text(changed.read_text().replace("because it is PASS", "because I say so"))
    [told] = broken_links(run)
    assert "report of round 3 follows" in told
    assert broken_link(run, 3) == told
    assert [broken_link(run, number) for number in (0, 1, 2)] == [None] * 3


def test_a_report_of_the_gate_that_was_taken_out_is_told(tmp_path: Path) -> None:
    run = chained(tmp_path / "run", 4)
    run.round(2).gate_report.unlink()
    [told] = broken_links(run)
    assert told.startswith("the gate report of round 3 follows report ")
    assert "of round 2, and there is none: it was taken out" in told
    shutil.rmtree(run.round(2).path)
    assert broken_links(run) == [told]


def test_a_report_of_the_gate_that_names_none_before_it_is_told_from_round_2_on(tmp_path: Path) -> None:
    run = chained(tmp_path / "run", 1)
    publish(run.round(2).stage("gate"), {"gate_report.json": gate_report(2, GateState.PASS).model_dump_json()})
    [told] = broken_links(run)
    assert told.startswith("the gate report of round 2 names no report of round 1")


def test_the_last_report_cannot_be_taken_out_of_a_round_that_has_ended(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    played_round(run, 1, GateState.FAIL)
    assert broken_links(run) == []
    run.round(1).gate_report.unlink()
    [told] = broken_links(run)
    assert told.startswith("round 1 has ended, and its gate report is gone")


def test_win_rates_against_a_moved_anchor_name_its_round(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    played_round(run, 1, GateState.PASS)
    rebase(run, 1, reviewer="Ada", reason="released")
    played_round(run, 2, GateState.PASS)
    both = tuple(row_of(run, number) for number in (1, 2))
    assert [row.anchor_round for row in both] == [0, 1]
    table = rounds_table(run, both)
    [cells] = [[str(cell) for cell in column.cells] for column in table.columns if column.header == "win vs anchor"]
    assert cells == ["–", "– (round 1)"]
    assert [row["anchor_round"] for row in json.loads(run_json(run))["rounds"]] == [0, 0, 1]


def compared(run: RunDir, round_number: int, vs: str, wins: int, losses: int) -> list[Comparison]:
    kinds = [1.0] * wins + [0.0] * losses + [0.5] * (100 - wins - losses)
    return [
        Comparison(
            prompt_id=f"p{n}",
            vs=vs,
            kind=VerdictKind.TIE if p == 0.5 else VerdictKind.WINNER,
            p_candidate=p,
            ballot_keys=(),
        )
        for n, p in enumerate(kinds)
    ]


def test_strengths_add_up_over_rounds_and_count_each_comparison_once(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    assert strengths_of(run, alpha=0.05) == {}
    first = [*compared(run, 1, "previous", 60, 20), *compared(run, 1, "anchor", 60, 20)]
    second = [*compared(run, 2, "previous", 50, 25), *compared(run, 2, "anchor", 75, 10)]
    second += [second[0].model_copy(update={"prompt_id": "q", "kind": VerdictKind.UNDECIDED, "p_candidate": None})]
    for number, games in ((1, first), (2, second)):
        played_round(run, number, GateState.PASS)
        publish(run.round(number).stage("grade"), {"comparisons.jsonl": "".join(g.model_dump_json() + "\n" for g in games)})
    found = strengths_of(run, alpha=0.05)
    assert list(found) == [1, 2]
    assert 0 < found[1].value < found[2].value
    assert all(strength.low < strength.value < strength.high for strength in found.values())
    alone = strengths_of(RunDir(tmp_path / "run"), alpha=0.05)[1]
    # Round 1 met the start policy once, though it is both previous and anchor: 60 wins of 80 decided, with half a win each way as prior.
    assert alone.value == pytest.approx(math.log(60.5 / 20.5), abs=0.25)
    [line] = lines_of(found)
    assert ", start policy 0: round 1 +" in line


def test_one_round_s_json_holds_its_gate_report(tmp_path: Path) -> None:
    run = started_run(tmp_path / "run")
    played_round(run, 1, GateState.FAIL)
    told = json.loads(run_json(run, 1))
    assert GateReport.model_validate(told["gate_report"]).state is GateState.FAIL
    assert [row["round"] for row in told["rounds"]] == [0, 1]
    assert json.loads(run_json(run, 0))["gate_report"] is None
    assert "gate_report" not in json.loads(run_json(run))
