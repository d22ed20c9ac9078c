"""The row of a round says what its gate said: on the same prompts, with the same intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from dpo_loop.evaluation.statistics import win_rate_limit
from dpo_loop.layout import RunDir
from dpo_loop.types import Comparison, GateState, GradeRow, Prompt, Record, Side
from flows.rounds import begin_round
from flows.strengths import strengths_of
from flows.summary import graded_parts, summarise
from tests.evaluation.rounds import answers, comparison, prompts_of
from tests.flows.runs import gate_report, publish, started_run

PROMPTS = prompts_of(40)
HARMFUL, TASKS = ([prompt for prompt in PROMPTS if prompt.side is side] for side in (Side.HARMFUL, Side.TASK))
FIRST, RESERVE = [*HARMFUL[:20], *TASKS[:20]], [*HARMFUL[20:], *TASKS[20:]]


def lines(rows: Sequence[Record]) -> str:
    return "".join(row.model_dump_json() + "\n" for row in rows)


def graded(prompts: list[Prompt], *, num_bad: int, num_wins: int) -> dict[str, str]:
    """num_bad: harmful prompts on which the candidate complies. Tasks that it does not win it loses."""
    rows: list[GradeRow] = [
        *answers(prompts, "candidate", num_bad={Side.HARMFUL: num_bad}),
        *answers(prompts, "previous"),
        *answers(prompts, "anchor"),
    ]
    tasks = [prompt.id for prompt in prompts if prompt.side is Side.TASK]
    games: list[Comparison] = [
        comparison(id, vs, float(number < num_wins)) for vs in ("previous", "anchor") for number, id in enumerate(tasks)
    ]
    return {"grades.jsonl": lines(rows), "comparisons.jsonl": lines(games)}


def topped_up_run(path: Path, *, eval_reserve: float = 0.5, topped_up: bool = True) -> RunDir:
    prompts = {"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}, "eval_reserve": eval_reserve}
    run = started_run(path, prompts=prompts)
    first, here = run.round(0), run.round(1)
    publish(first.stage("evalset"), {"prompts.jsonl": lines(FIRST)})
    publish(first.stage("reserve"), {"prompts.jsonl": lines(RESERVE)})
    begin_round(run, 1)
    publish(here.stage("grade"), graded(FIRST, num_bad=1, num_wins=18))
    publish(here.stage("grade_more"), graded(RESERVE, num_bad=9, num_wins=6))
    report = gate_report(1, GateState.PASS).model_copy(update={"topped_up": topped_up})
    publish(here.stage("gate"), {"gate_report.json": report.model_dump_json()})
    return run


def test_after_a_top_up_both_parts_are_in_the_rates_and_the_interval_is_the_gates(tmp_path: Path) -> None:
    row = summarise(topped_up_run(tmp_path), 1, promoted=True)
    assert row.harmful_rate == pytest.approx(10 / 40)
    assert row.win_rate_previous == row.win_rate_anchor == pytest.approx(24 / 40)
    limits = [win_rate_limit(24, 16, 40, alpha=0.05 / 2, side=side) for side in ("lower", "upper")]
    assert row.win_rate_anchor_ci == pytest.approx(limits)
    assert math.isclose(row.pass_rate or 0, 1.0)


def test_a_top_up_that_the_gate_did_not_count_is_not_in_the_rates(tmp_path: Path) -> None:
    run = topped_up_run(tmp_path, topped_up=False)
    assert graded_parts(run, 1) == [(run.round(0).stage("evalset"), run.round(1).stage("grade"))]
    row = summarise(run, 1, promoted=False)
    assert (row.harmful_rate, row.win_rate_previous) == (1 / 20, 18 / 20)
    assert graded_parts(run, 0) == []


@pytest.mark.parametrize(("eval_reserve", "alpha"), [(0.0, 0.05), (0.5, 0.025)])
def test_one_look_has_all_of_alpha_and_two_have_half_of_it_each(tmp_path: Path, eval_reserve: float, alpha: float) -> None:
    row = summarise(topped_up_run(tmp_path, eval_reserve=eval_reserve, topped_up=False), 1, promoted=False)
    limits = [win_rate_limit(18, 2, 20, alpha=alpha, side=side) for side in ("lower", "upper")]
    assert row.win_rate_previous_ci == pytest.approx(limits)


def test_games_of_a_top_up_count_for_the_strength(tmp_path: Path) -> None:
    found = strengths_of(topped_up_run(tmp_path), alpha=0.05)[1]
    # 24 wins and 16 losses, with half a win each way as prior; 18 and 2 would be about 2.
    assert found.value == pytest.approx(math.log(24.5 / 16.5), abs=0.1)
