"""The win rate at equal length, as a check of the gate."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_loop.config import CheckConfig, GateConfig
from dpo_loop.evaluation.checks import run_checks
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.types import GateState, Side
from tests.evaluation.rounds import POLICIES, answer, comparison, prompts_of


def compared_by_length(*, likes_length: bool) -> Evidence:
    """400 tasks; the candidate writes 10 tokens more on three of four prompts. The judge prefers the longer answer, or decides by lot."""
    prompts = [prompt for prompt in prompts_of(400) if prompt.side is Side.TASK]
    rng = np.random.default_rng(11)
    more = np.where(rng.random(400) < 0.75, 10, -10) + rng.integers(-3, 4, size=400)
    p_win = 1 / (1 + np.exp(-2.0 * np.tanh(more / 10))) if likes_length else np.full(400, 0.68)
    scores = (rng.random(400) < p_win).astype(float)
    rows = [
        answer(prompt, policy).model_copy(update={"num_tokens": 30 + (int(longer) if policy == "candidate" else 0)})
        for prompt, longer in zip(prompts, more, strict=True)
        for policy in POLICIES
    ]
    games = [comparison(prompt.id, "previous", float(score)) for prompt, score in zip(prompts, scores, strict=True)]
    return Evidence(prompts, rows, games, alpha=0.05)


@pytest.mark.parametrize("likes_length", [True, False])
def test_a_win_rate_that_is_only_length_is_told_from_one_that_is_not(likes_length: bool) -> None:
    evidence = compared_by_length(likes_length=likes_length)
    checks = tuple(
        CheckConfig(id=metric, metric=metric, rule="floor", vs="previous", margin=0.55) for metric in ("win_rate", "lc_win_rate")
    )
    raw, controlled = run_checks(evidence, GateConfig(checks=checks))
    assert raw.state is GateState.PASS
    assert (raw.value or 0) > 0.6
    if likes_length:
        assert controlled.state is not GateState.PASS
        assert (controlled.ci_low or 1) < 0.5 < (controlled.ci_high or 0)
        assert "win rate at equal length" in controlled.why
    else:
        assert controlled.state is GateState.PASS
        assert controlled.value == pytest.approx(raw.value, abs=0.06)


def test_undecided_comparisons_widen_it_and_equal_lengths_leave_the_win_rate() -> None:
    evidence = compared_by_length(likes_length=False)
    check = CheckConfig(id="lc", metric="lc_win_rate", rule="floor", vs="previous", margin=0.55)
    [whole] = run_checks(evidence, GateConfig(checks=(check,)))
    games = [comparison(c.prompt_id, "previous", None if n < 40 else c.p_candidate) for n, c in enumerate(evidence.comparisons)]
    [lost] = run_checks(Evidence(evidence.prompts.values(), evidence.rows, games, alpha=0.05), GateConfig(checks=(check,)))
    assert (lost.ci_low or 1) < (whole.ci_low or 0) - 0.02
    assert (lost.ci_high or 0) > (whole.ci_high or 1) - 0.01
    same = [row.model_copy(update={"num_tokens": 30}) for row in evidence.rows]
    both = (check, CheckConfig(id="raw", metric="win_rate", rule="floor", vs="previous", margin=0.55))
    controlled, raw = run_checks(
        Evidence(evidence.prompts.values(), same, evidence.comparisons, alpha=0.05), GateConfig(checks=both)
    )
    assert (controlled.value, controlled.ci_low, controlled.ci_high) == (raw.value, raw.ci_low, raw.ci_high)
