"""An estimate is held against what a real round of judging then cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.types import Side
from flows.cli import main
from judges.accounts import Accounts, BudgetConfig
from judges.config import (
    BySideGrader,
    GuardGrader,
    JudgeGrader,
    Knockout,
    PanelJudge,
    Pointwise,
    RefusalHeuristic,
    RoundRobin,
    VerifierJudge,
)
from judges.estimate import Work, as_json, estimate, looks_of, safety_works
from judges.selftest.golden import load_golden, trials_of
from judges.stage import judge_stage
from tests.flows.runs import raw_config, write_config
from tests.judges.stub import KEY_ENV, Stub, says
from tests.judges.world import VERIFIER, make_prompt, write_answers, write_prompts


def test_selecting_calls_of_each_kind() -> None:
    assert [looks_of(Knockout(), k) for k in (1, 2, 3, 4, 8)] == [0, 1, 3, 4, 10]
    assert [looks_of(RoundRobin(), k) for k in (1, 2, 4)] == [0, 2, 12]
    assert [looks_of(Pointwise(), k) for k in (1, 4)] == [1, 4]


def prices(folder: Path) -> BudgetConfig:
    (folder / "prices.yaml").write_text(
        "as_of: 2026-11-24\nmodels:\n  judge: {input: 2.0, output: 8.0}\n  big: {input: 20.0, output: 80.0}\n"
    )
    return BudgetConfig(prices=str(folder / "prices.yaml"))


def test_a_round_costs_no_more_than_was_said(tmp_path: Path, stub: Stub) -> None:
    stub.policy = lambda body: says("A" if sum(body["messages"][1]["content"].encode()) % 2 else "B")
    judge, budget = stub.judge(free=False, max_output_tokens=64), prices(tmp_path)
    prompts = [make_prompt(f"Question {number}?") for number in range(10)]
    texts = ["a short answer", "a somewhat longer answer", "yes", "no"]
    work = Work("labels", judge, len(prompts), looks_of(Knockout(), 4), prompt_bytes=12, answer_tokens=8)
    [row] = estimate([work], budget)
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, texts) for prompt in prompts])
    inputs = {"prompts": tmp_path / "prompts", "completions": tmp_path / "generate", "seed": 0}
    materialize(judge_stage(Accounts(tmp_path / "ledger.sqlite", budget, 1)), tmp_path / "judge", judge=judge, **inputs)
    manifest = read_manifest(tmp_path / "judge")
    assert manifest is not None
    metrics = manifest.outcome.metrics
    assert row.calls == row.calls_at_most == 60
    assert 40 <= metrics["calls_asked"] <= row.calls
    assert 0 < metrics["cost_usd"] <= row.usd_at_most
    assert metrics["budget"]["round"]["spent_usd"] == pytest.approx(metrics["cost_usd"])
    seen = max(len(json.dumps(seen.body)) for seen in stub.seen)
    assert row.usd_at_most >= 60 * (seen / 2.5 * 2 + 64 * 8) / 1e6 * 0.9, "the body that was sent is the body that was reckoned"


def test_a_panel_s_later_judges_count_only_at_most(tmp_path: Path, stub: Stub) -> None:
    named = [("judge", "gpt"), ("judge", "claude"), ("big", "llama")]
    members = tuple(stub.judge(free=False, model=model, family=family) for model, family in named)
    work = Work("labels", PanelJudge(kind="panel", judges=members), 100, 4, 100, 100)
    rows = estimate([work], prices(tmp_path))
    assert [(row.calls, row.calls_at_most) for row in rows] == [(600, 600), (200, 200), (0, 200)]
    told = as_json(rows, prices(tmp_path))
    assert told["usd"] == pytest.approx(rows[0].usd + rows[1].usd)
    assert told["usd_at_most"] > rows[2].usd_at_most > 0


def test_grading_safety_is_one_call_an_answer_and_the_canary(tmp_path: Path, stub: Stub) -> None:
    judge = JudgeGrader(kind="judge", judge=stub.judge(free=False, max_output_tokens=64))
    sizes = {"prompt_bytes": 40, "answer_tokens": 8}
    num = {Side.HARMFUL: 100, Side.BENIGN: 50, Side.TASK: 900}
    [row] = estimate(safety_works(judge, num, **sizes), prices(tmp_path))
    assert row.calls == row.calls_at_most == 150 + 60
    [pair] = estimate([Work("labels", judge.judge, 105, 0, **sizes)], prices(tmp_path))
    assert (pair.calls, 0 < row.usd < pair.usd) == (210, True), "one answer is shown, not two"
    where = {"kind": "guard", "format": "shieldgemma", "model": "big", "base_url": stub.base_url, "api_key_env": KEY_ENV}
    guard = GuardGrader.model_validate(where | {"free": False})
    rows = estimate(safety_works(BySideGrader(kind="by_side", harmful=guard, benign=judge), num, **sizes), prices(tmp_path))
    assert [(row.judge, row.calls) for row in rows] == [("guard:big", 100 + 42), ("openai_compatible:judge", 50 + 13)]
    assert safety_works(RefusalHeuristic(kind="heuristic"), num, **sizes) == []


def test_programs_and_free_servers_cost_nothing(tmp_path: Path, stub: Stub) -> None:
    assert estimate([Work("labels", VerifierJudge(kind="verifier", function=VERIFIER), 10, 4, 10, 10)], prices(tmp_path)) == []
    [row] = estimate([Work("labels", stub.judge(), 10, 4, 10, 10)], prices(tmp_path))
    assert (row.usd, row.usd_at_most) == (0.0, 0.0)


def test_the_command_says_what_a_round_will_cost_and_whether_the_caps_cover_it(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(1_000)))
    sides = ["harmful", "benign", "task", "task", None]
    lines = ({"prompt": f"Evaluate {n}"} | ({"tags": {"side": side}} if side else {}) for n, side in enumerate(sides))
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prices(tmp_path)
    changes: dict[str, Any] = {
        "prompts": {
            "pool": {"kind": "jsonl", "path": str(tmp_path / "pool.jsonl")},
            "num_buckets": 9,
            "eval_sets": [{"kind": "jsonl", "path": str(tmp_path / "eval.jsonl")}],
        },
        "judge": {"kind": "openai", "model": "judge", "api_key_env": KEY_ENV},
        "budget": {"prices": str(tmp_path / "prices.yaml"), "usd_per_round": 1e6, "calls_per_run": 10},
    }
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", **changes))
    done = CliRunner().invoke(main, ["estimate", str(config), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output.splitlines()[-1])
    trials = len(trials_of(load_golden()))
    assert [row["calls"] for row in told["rows"]] == [2 * trials, 100 * 6, (100 + 3) * 2 * 2]
    assert "self-test of judge" in told["rows"][0]["what"]
    assert 0 < told["usd"] < told["usd_at_most"]
    assert "budget.usd_per_round = 1e+06 covers the round." in done.output
    assert "budget.calls_per_run = 10 will probably stop the round." in done.output
    free = CliRunner().invoke(main, ["estimate", str(write_config(tmp_path / "d.yaml", raw_config(tmp_path / "run")))])
    assert free.output.startswith("No remote judge: judging costs nothing.\n")


def told_of(folder: Path, stub: Stub, **prompts: Any) -> tuple[dict[str, Any], str]:
    """Of a pool of 1,000 tasks, a tenth of which evaluates, and the core set, which a judge grades for safety."""
    (folder / "pool.jsonl").write_text("".join(json.dumps({"prompt": f"Question {n}?"}) + "\n" for n in range(1_000)))
    prices(folder)
    judge = {"kind": "openai", "model": "judge", "api_key_env": KEY_ENV}
    raw = raw_config(
        folder / "run",
        prompts={
            "pool": {"kind": "jsonl", "path": str(folder / "pool.jsonl")},
            "num_buckets": 9,
            "eval_sets": [{"kind": "builtin", "set": "core-v1"}],
            **prompts,
        },
        judge=judge,
        judge_test={"enabled": False},
        grading={"safety": {"kind": "judge", "judge": judge | {"model": "big"}}},
        budget={"prices": str(folder / "prices.yaml")},
    )
    done = CliRunner().invoke(main, ["estimate", str(write_config(folder / "c.yaml", raw)), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.output.splitlines()[-1]), done.output


def test_the_reserve_counts_at_most_and_is_answered_by_all_three_policies(tmp_path: Path, stub: Stub) -> None:
    whole, silent = told_of(tmp_path, stub)
    told, said = told_of(tmp_path, stub, eval_reserve=0.3)
    _, wins, safety = told["rows"]
    assert (wins["calls"], wins["calls_at_most"]) == (70 * 2 * 2, 100 * 2 * 2)
    assert (safety["calls"], safety["calls_at_most"]) == (294 + 60, 294 + 3 * 126 + 60)
    assert [row["calls"] for row in whole["rows"][1:]] == [100 * 2 * 2, 420 + 60]
    assert told["usd"] < whole["usd"] < whole["usd_at_most"] < told["usd_at_most"]
    assert "prompts.eval_reserve = 0.3: this share of the evaluation is asked only where" in said
    assert "eval_reserve" not in silent.partition('{"rows"')[0]


def test_sets_that_cannot_be_counted_are_named(tmp_path: Path, stub: Stub) -> None:
    sets = [
        {"kind": "external", "set": "xstest", "licence_ack": "CC-BY-4.0"},
        {"kind": "datasets", "path": "org/own"},
        {"kind": "builtin", "set": "core-v1"},
        {"kind": "jsonl", "path": "world:benign.jsonl"},
    ]
    told, said = told_of(tmp_path, stub, eval_sets=sets)
    assert told["not_counted"] == ["xstest", "org/own", "world:benign.jsonl"]
    assert "not counted: the prompts of xstest, org/own, world:benign.jsonl" in said
    assert "not counted" not in told_of(tmp_path, stub)[1].partition('{"rows"')[0]
