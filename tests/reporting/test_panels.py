"""Panels of the page that are made from the gate report and from what stages counted."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_loop.reporting.banner import banner_of
from dpo_loop.reporting.health import bills_of, signs_of, total_cost
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.types import GateState, PolicyRef, Side
from tests.reporting.cases import CANARY, CHECK, CONDITIONS, PERPLEXITY, PROMPT_SETS, case, figures, full_figures, full_gate, gate
from tests.reporting.test_page import Page


def text_of(report: Any, **data: Any) -> str:
    return Page(render_report(RoundData(run_id="r", run_dir="runs/r", round=2, gate=report, **data))).text


@pytest.mark.parametrize("state", list(GateState))
def test_every_state_has_a_command_to_act(state: GateState) -> None:
    banner = banner_of(gate(state), run_dir="runs/my demo", round_number=2)
    assert banner.commands
    assert all("'runs/my demo' 2" in command for command in banner.commands)
    assert any("approve" in command for command in banner.commands) is state.waits_for_person


def test_waived_checks_stand_in_the_banner_and_in_the_table() -> None:
    waived = CHECK.model_copy(update={"waived_by": "ann until round 4: known, mended soon"})
    text = text_of(gate(checks=(waived,)))
    assert "waived harm: too much harm ann until round 4: known, mended soon" in text
    assert text.count("waived") == 2
    assert "waived" not in text_of(gate(checks=(CHECK,)))


def test_the_judge_canary_is_told_in_figures() -> None:
    text = text_of(gate(judge_canary=CANARY))
    assert "guard-8b on 60 answers whose right grade is known right 57 of 60, 95.0 % not graded 1 kappa 0.91" in text
    assert "97.0 % specificity (refusals seen) –" in text
    assert "partial refusal 8 of 10" in text
    assert "Judge canary" not in text_of(gate())


def test_churn_conditions_and_prompt_sets_are_shown() -> None:
    text = text_of(gate(churn={"harmful_rate": 0.015}, conditions=CONDITIONS, prompt_sets=PROMPT_SETS))
    assert "harmful compliance 1.5 %" in text
    assert "decoding max new tokens 256" in text
    assert "builtin:core-v1 – CC0-1.0 420 no" in text
    assert f"hub:some/set {'f' * 12} – 0 no network" in text
    assert f"prompts of builtin:core-v1 {'ab' * 32}" in text
    assert "vllm 0.32.0" in text


def test_provenance_chains_the_reports() -> None:
    text = text_of(gate(previous_report_sha256="1" * 64, config_sha256="2" * 64), gate_sha256="3" * 64)
    for name, digit in (("this round", "3"), ("the round before", "1")):
        assert f"gate report of {name} {digit * 64}" in text
    assert f"config of the gate {'2' * 64}" in text
    assert "dpo-loop show runs/r 2 --json" in text
    assert "dpo-loop step gate --run runs/r --round 2" in text


def test_a_sealed_prompt_that_a_reason_names_is_not_named_in_the_page() -> None:
    sealed, open_ = case(Side.HARMFUL, "rrc", tags={"sealed": "true"}, ask="a"), case(Side.HARMFUL, "rrc", ask="b")
    report = gate(reasons=(f"veto: new on {sealed.prompt.id}, {open_.prompt.id}",), checks=(CHECK.model_copy(update={"why": sealed.prompt.id, "ci_low": None}),))  # fmt: skip
    given = [sealed, open_]
    html = render_report(RoundData(run_id="r", run_dir="r", round=2, gate=report, cases=given, samples=samples_of(given)))
    assert sealed.prompt.id not in html
    assert f"new on a sealed prompt, {open_.prompt.id}" in html
    assert "1 sealed prompts are counted above and shown nowhere" in Page(html).text


def test_a_judge_that_leans_is_worth_a_look() -> None:
    signs = signs_of([figures("judging", consistency=0.9, first_position_win_rate=0.71, longer_win_rate=None)])
    assert [(sign.name, sign.is_usual) for sign in signs] == [("both orders agree", True), ("first position wins", False)]


def test_the_cost_is_the_sum_and_unknown_where_a_part_is() -> None:
    stages = [
        figures("judging", judge="big", calls_asked=10, cost_usd=1.25, undecided_calls={"over_budget": 2}),
        figures("pairing"),
        figures("grading", judge="big", calls_asked=4, cost_usd=0.5),
    ]
    bills = bills_of(stages)
    assert [(bill.stage, bill.num_asked, bill.undecided) for bill in bills] == [
        ("judging", 10, "over budget 2"),
        ("grading", 4, ""),
    ]
    assert total_cost(bills) == 1.75
    assert "Judge calls: $1.75" in text_of(gate(), stages=tuple(stages))
    assert total_cost(bills_of([*stages, figures("again", calls_asked=1, cost_usd=None)])) is None
    assert total_cost([]) is None


def test_previous_and_anchor_share_a_table_of_grades_where_they_are_one_policy() -> None:
    given = [case(Side.TASK, "++-")]
    other = PolicyRef(base="b", base_sha256="1" * 64)
    assert "Task prompts: anchor to candidate" not in text_of(gate(), cases=given)
    assert "Task prompts: anchor to candidate" in text_of(gate(anchor=other), cases=given)


def test_a_perplexity_is_no_share() -> None:
    text = text_of(gate(checks=(PERPLEXITY,)))
    assert "perplexity of prose no worse than anchor by more than 5.0 % 40 12.5 12 +4.2 %" in text
    assert "ppl: 4.2 percent, interval 3.0 to 4.8, limit 5.0: PASS" in text


def test_clusters_and_the_reserve_are_told() -> None:
    text = text_of(full_gate())
    assert "100 worth 59" in text
    assert "the reserve of prompts was asked too" in text


def test_judges_of_a_panel_are_compared() -> None:
    text = text_of(gate(), stages=full_figures())
    assert "Judges agree big and small num 500 agree 0.81 kappa 0.62" in text
    assert text.count(" look ") == 3


def test_categories_in_which_nothing_changed_are_folded_away() -> None:
    quiet = [case(Side.TASK, "+++", category=name, ask=name) for name in ("a", "b")]
    text = text_of(gate(), cases=[*quiet, case(Side.TASK, "++-", category="c", ask="c")])
    assert "2 categories in which nothing changed" in text
    assert text.index("c task 1 100.0 %") < text.index("2 categories")
    start = [case(Side.TASK, "+", category=name, ask=name) for name in ("a", "b")]
    assert "in which nothing changed" not in text_of(gate(), cases=start)
