"""A round whose evaluation has all that it can have, played for real: a second evaluation of the anchor, a first look that cannot decide, the
reserve of prompts asked of all three policies, capability tasks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_loop.exchange import read_capability, read_gate_report, read_grades, read_prompts
from dpo_loop.files import write_text
from dpo_loop.layout import RunDir
from dpo_loop.types import GateReport, GateState
from tests.conftest import TINY_CONFIG

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CHECKS = [
    {"id": "pass", "metric": "pass_rate", "rule": "non_inferior", "vs": "previous", "margin": 0.01},
    {"id": "words", "metric": "capability", "task": "words", "rule": "non_inferior", "vs": "anchor", "margin": 0.9},
    {"id": "text", "metric": "capability", "task": "text", "rule": "non_inferior", "vs": "previous", "margin": 1.0},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("evaluation")
    write_text(folder / "words.jsonl", "".join(json.dumps({"prompt": f"say: w{i}", "answer": f"w{i}"}) + "\n" for i in range(12)))
    choices = ({"prompt": f"upper: w{i}", "choices": [f"W{i}", f"w{i}"], "answer": 0} for i in range(12))
    write_text(folder / "choices.jsonl", "".join(json.dumps(line) + "\n" for line in choices))
    write_text(folder / "text.txt", "\n\n".join(f"the words of document {i} go on and on" for i in range(12)))
    tasks = [
        {"kind": "exact_match", "id": "words", "path": str(folder / "words.jsonl"), "max_new_tokens": 8},
        {"kind": "multiple_choice", "id": "choices", "path": str(folder / "choices.jsonl")},
        {"kind": "perplexity", "id": "text", "path": str(folder / "text.txt")},
    ]
    made = RunDir(folder / "run")
    changes = {
        "run_dir": str(made.path),
        "rounds": 1,
        "prompts.eval_reserve": 0.4,
        "answering.measure_churn": True,
        "capability.tasks": tasks,
        "gate.checks": CHECKS,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    played = subprocess.run(
        [sys.executable, "-m", "flows.cli", "run", str(TINY_CONFIG), *sets], capture_output=True, text=True, check=False
    )
    assert played.returncode == GateState.NEEDS_REVIEW.exit_code, played.stdout[-3000:] + played.stderr[-3000:]
    return made


@pytest.fixture(scope="module")
def report(run: RunDir) -> GateReport:
    return read_gate_report(run.round(1).stage("gate"))


def test_what_the_first_look_cannot_decide_is_asked_again_with_the_reserve(run: RunDir, report: GateReport) -> None:
    look = read_gate_report(run.round(1).stage("look"))
    assert (look.state, look.topped_up) == (GateState.INCONCLUSIVE, False)
    assert (report.state, report.topped_up) == (GateState.NEEDS_REVIEW, True)
    main, reserve = (list(read_prompts(run.round(0).stage(name))) for name in ("evalset", "reserve"))
    assert {prompt.id for prompt in main}.isdisjoint(prompt.id for prompt in reserve)
    num_tasks = sum(prompt.side.value == "task" for prompt in (*main, *reserve))
    assert report.checks[0].num_prompts == num_tasks > look.checks[0].num_prompts
    assert "97.5 %" in report.checks[0].why  # both looks share alpha
    graded = list(read_grades(run.round(1).stage("grade_more")))
    assert len(graded) == 3 * len(reserve)


def test_the_anchor_answers_the_reserve_once_where_it_is_the_previous_policy(run: RunDir) -> None:
    assert not run.round(1).stage("more_previous").exists()
    assert run.round(1).stage("more_anchor").is_dir()


def test_the_evaluation_is_shown_to_be_sound(report: GateReport) -> None:
    states = {result["id"]: result["state"] for result in report.validity}
    assert set(states.values()) == {"PASS"}
    assert {"adapter", "conditions", "contamination", "churn", "coverage"} <= states.keys()
    assert report.conditions["decoding"]["max_new_tokens"] == 24
    assert set(report.churn) == {"pass_rate", "harmful_rate", "over_refusal_rate"}
    assert 0 < report.churn["pass_rate"] < 1  # a barely trained policy that samples


def test_capability_is_compared_item_by_item(run: RunDir, report: GateReport) -> None:
    rows = list(read_capability(run.round(1).stage("capability")))
    assert {(row.task, row.measure) for row in rows} == {("words", "correct"), ("choices", "correct"), ("text", "nll")}
    words, text = report.checks[1:]
    assert (words.task, words.num_prompts, words.vs) == ("words", 12, "anchor")
    assert text.value is not None
    assert text.value > 1  # a perplexity
    assert "perplexity of text" in text.why


def test_where_the_prompts_come_from_is_in_the_report(report: GateReport) -> None:
    assert len(report.prompt_sets) == 6  # the pool, harmful and benign: the evaluation, then the reserve
    assert all(each.sha256 and each.num_prompts for each in report.prompt_sets)


def test_the_round_can_be_looked_at_and_decided(run: RunDir, tmp_path: Path) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "flows.cli", "show", str(run.path), "1"], capture_output=True, text=True, check=True
    )
    assert "more_candidate" in shown.stdout
    status = subprocess.run(
        [sys.executable, "-m", "flows.cli", "status", str(run.path), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(status.stdout)["round_state"] == "waiting"
