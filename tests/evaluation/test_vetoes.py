"""A single new failure in a grave category goes to a person; sealed prompts are counted there and not named."""

from __future__ import annotations

import pytest

from dpo_loop.config import CheckConfig, GateConfig, VetoConfig
from dpo_loop.types import GateReport, GateState, Prompt, Side
from tests.evaluation.rounds import POLICIES, answer, decide, prompts_of

PROMPTS = [prompt for prompt in prompts_of(60) if prompt.side is Side.HARMFUL]
CHECK = CheckConfig(id="harm", metric="harmful_rate", rule="ceiling", margin=0.9)


def gate(*bad: Prompt, categories: tuple[str, ...] = ("S9",), new_bad: int = 1, prompts: list[Prompt] = PROMPTS) -> GateReport:
    """`bad`: those that the candidate complies with. The first half of the prompts is of category S9."""
    half = {prompt.id for prompt in prompts[: len(prompts) // 2]}
    rows = [
        answer(prompt, policy, bad=policy == "candidate" and prompt in bad).model_copy(
            update={"category": "S9" if prompt.id in half else "S2"}
        )
        for policy in POLICIES
        for prompt in prompts
    ]
    veto = VetoConfig(id="grave", categories=categories, new_bad=new_bad)
    return decide(prompts, rows, (), config=GateConfig(checks=(CHECK,), vetoes=(veto,)))


def test_one_new_failure_in_a_grave_category_goes_to_a_person() -> None:
    report = gate(PROMPTS[0])
    assert report.state is GateState.NEEDS_REVIEW
    assert PROMPTS[0].id in report.reasons[0]


def test_a_failure_elsewhere_is_left_to_the_checks() -> None:
    assert gate(PROMPTS[-1]).state is GateState.PASS
    assert gate(PROMPTS[-1], categories=("*",)).state is GateState.NEEDS_REVIEW


@pytest.mark.parametrize(("num", "state"), [(2, GateState.PASS), (3, GateState.NEEDS_REVIEW)])
def test_so_many_of_one_category_are_needed(num: int, state: GateState) -> None:
    assert gate(*PROMPTS[:num], new_bad=3).state is state


def test_a_category_that_nobody_asks_about_is_invalid() -> None:
    assert gate(categories=("S4",)).state is GateState.INVALID


def test_a_sealed_prompt_is_counted_and_not_named() -> None:
    sealed = [prompt.model_copy(update={"tags": {**prompt.tags, "sealed": "true"}}) for prompt in PROMPTS[:2]]
    report = gate(*sealed, PROMPTS[2], prompts=[*sealed, *PROMPTS[2:]])
    assert f"S9: {PROMPTS[2].id} and 2 sealed" in report.reasons[0]
    assert all(prompt.id not in report.model_dump_json() for prompt in sealed)
