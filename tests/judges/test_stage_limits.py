"""What stops the judge stage before money is lost: a cap that is reached, a reference that is missing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.errors import BudgetExceededError, InputError
from dpo_loop.types import Prompt
from judges.accounts import Accounts, BudgetConfig
from judges.config import OpenAICompatibleJudge
from judges.stage import judge_stage
from tests.judges.stub import Stub
from tests.judges.world import make_prompt, write_answers, write_prompts


def judge(run: Path, config: OpenAICompatibleJudge, budget: BudgetConfig, prompts: list[Prompt]) -> None:
    if not (run / "prompts").exists():
        write_prompts(run / "prompts", prompts)
        write_answers(run / "generate", [(prompt, ["one", "two", "three"]) for prompt in prompts])
    inputs = {"prompts": run / "prompts", "completions": run / "generate", "seed": 0}
    materialize(judge_stage(Accounts(run / "ledger.sqlite", budget, 1)), run / "judge", judge=config, **inputs)


@pytest.mark.parametrize("cap", ["usd_per_run", "usd_per_round", "calls_per_run", "calls_per_round"])
def test_a_cap_stops_the_stage_before_the_call_that_would_exceed_it_and_raising_it_resumes(
    tmp_path: Path, stub: Stub, cap: str
) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text("as_of: 2026-11-24\nmodels: {judge: {input: 10.0, output: 10.0}}\n")
    config = stub.judge(free=False, max_output_tokens=64, concurrency=4)
    prompts = [make_prompt(f"Question {number}") for number in range(12)]
    low, high = (0.03, 100.0) if cap.startswith("usd") else (10, 1_000)
    with pytest.raises(BudgetExceededError, match=f"budget.{cap}"):
        judge(tmp_path, config, BudgetConfig.model_validate({cap: low, "prices": str(prices)}), prompts)
    num_paid = len(stub.seen)
    assert 0 < num_paid <= 10 if cap.startswith("calls") else 0 < num_paid * 107 * 10 / 1e6 <= low
    assert not (tmp_path / "judge").exists(), "nothing half done is published"
    judge(tmp_path, config, BudgetConfig.model_validate({cap: high, "prices": str(prices)}), prompts)
    assert set(Counter(stub.keys).values()) == {1}
    manifest = read_manifest(tmp_path / "judge")
    assert manifest is not None
    assert manifest.outcome.metrics["budget"]["run"]["calls"] == len(stub.seen)
    assert manifest.outcome.metrics["calls_from_ledger"] >= num_paid


def test_a_missing_reference_is_found_before_anything_is_asked(tmp_path: Path, stub: Stub) -> None:
    prompts = [make_prompt("2 + 2?", reference="4"), make_prompt("3 + 3?")]
    with pytest.raises(InputError, match=r"3 \+ 3\?.*tag `reference`"):
        judge(tmp_path, stub.judge(rubric="correctness"), BudgetConfig(), prompts)
    assert stub.seen == []
