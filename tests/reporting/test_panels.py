"""Panels of the page that are made from the gate report and from what stages counted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dpo_loop.config import CheckConfig, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.decision import judge_candidate
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.reporting.banner import banner_of
from dpo_loop.reporting.figures import history_with_gate, passing_chance
from dpo_loop.reporting.health import bills_of, signs_of, total_cost
from dpo_loop.reporting.page import RoundData, render_report
from dpo_loop.reporting.samples import samples_of
from dpo_loop.types import GateReport, GateState, PolicyRef, RoundSummary, Side
from tests.reporting.cases import (
    CANARY,
    CHECK,
    CONDITIONS,
    PERPLEXITY,
    PROMPT_SETS,
    REF,
    case,
    figures,
    full_figures,
    full_gate,
    gate,
)
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
    assert "perplexity of prose no worse than anchor by more than 5.0 % ppl 40 12.5 12 +4.2 %" in text
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
    assert text.index("c task 1 0 100.0 %") < text.index("2 categories")
    start = [case(Side.TASK, "+", category=name, ask=name) for name in ("a", "b")]
    assert "in which nothing changed" not in text_of(gate(), cases=start)


VETO = CHECK.model_copy(update={"id": "grave", "rule": "veto", "vs": "previous", "num_prompts": 19, "value": 1 / 19, "margin": 1 / 19, "ci_low": None,
                                "ci_high": None, "state": GateState.NEEDS_REVIEW, "why": "veto grave: harmful compliance is new against previous on S4: p1 (1 in all)"})  # fmt: skip


def test_a_veto_counts_prompts_and_has_a_table_of_its_own() -> None:
    text = text_of(gate(checks=(CHECK, VETO)))
    assert "Vetoes Too few prompts for statistics" in text
    row = "newly harmful against previous grave 1 of 19 1 in a category veto grave: harmful compliance is new against previous on S4: p1 (1 in all) NEEDS REVIEW"
    assert row in text
    assert "5.3 %" not in text
    assert 'id="checks"' in render_report(RoundData(run_id="r", run_dir="r", round=2, gate=gate(checks=(VETO,))))


def test_a_check_is_named_as_a_waiver_names_it() -> None:
    assert "stays below 5.0 % harm 100" in text_of(gate(checks=(CHECK,)))


def test_partial_answers_are_told_apart() -> None:
    partial = CHECK.model_copy(update={"num_partial": 7})
    assert "10.0 % 10, of which 7 partial" in text_of(gate(checks=(partial,)))
    assert "of which" not in text_of(gate(checks=(CHECK,)))
    assert "of which" not in text_of(gate(checks=(partial.model_copy(update={"value": 0.0, "num_partial": 0}),)))


def test_rows_that_belong_to_no_run_have_commands_that_work() -> None:
    given = [case(Side.HARMFUL, "rrc"), case(Side.TASK, "+++")]
    again = "dpo-loop report --rows hos.jsonl --config gate.yaml --out out"
    for state in GateState:
        data = RoundData(run_id="hos", run_dir=None, round=0, gate=gate(state, round=0), gate_sha256="3" * 64, cases=given,
                         samples=samples_of(given), commands=(again,), index=None)  # fmt: skip
        page = Page(render_report(data))
        assert page.text.startswith(f"hos: {state.value.replace('_', ' ')} hos decided")
        assert not re.search(r"round \d|next round|previous policy (stays|generates)", page.text)
        assert not re.search(r"dpo-loop (show|step|approve|reject)", page.text)
        assert "sha256sum gate_report.json" in page.text
        assert again in page.text
        assert page.data["round"] is None
        assert "known by sha256 of its answers" in page.text


def test_counts_of_the_banner_are_against_the_previous_policy() -> None:
    """They were against previous or anchor, so that a candidate as good as the previous policy looked far better or worse than it is."""
    other = PolicyRef(base="b", base_sha256="1" * 64)
    given = [
        case(Side.HARMFUL, "rrc", ask="a"),
        *(case(Side.HARMFUL, "ccr", ask=f"b{i}") for i in range(2)),
        case(Side.HARMFUL, "crr", ask="c"),
    ]
    html = render_report(
        RoundData(run_id="r", run_dir="r", round=2, gate=gate(anchor=other), cases=given, samples=samples_of(given))
    )
    text = Page(html).text
    assert "1 newly harmful 2 no longer harmful against the previous policy" in text
    assert "As the previous policy, and other than the anchor: 1 not harmful" in text
    assert "moves between grades; a partial answer counts as bad in the rates" in text
    without = text_of(gate(), cases=given[:1])
    assert "1 newly harmful" in without
    assert "#samples?" not in render_report(RoundData(run_id="r", run_dir="r", round=2, gate=gate(), cases=given[:1]))


def test_a_topped_up_round_shows_the_figures_of_both_looks() -> None:
    """The summary of the round knows of the first look alone."""
    rates: dict[str, Any] = {
        "candidate": {"pass_rate": 0.61, "harmful_rate": 0.031},
        "previous": {"pass_rate": 0.6, "harmful_rate": 0.03},
    }
    wins = CHECK.model_copy(
        update={
            "id": "wins",
            "metric": "win_rate",
            "rule": "floor",
            "vs": "previous",
            "value": 0.57,
            "ci_low": 0.52,
            "ci_high": 0.62,
        }
    )
    report = gate(rates=rates, checks=(wins,), topped_up=True)
    first_look: dict[str, Any] = {
        "pass_rate": 0.5,
        "harmful_rate": 0.1,
        "over_refusal_rate": 0.1,
        "win_rate_previous": 0.4,
        "win_rate_anchor": 0.7,
    }
    history = tuple(
        RoundSummary(round=i, parent=None, gate=None, promoted=True, num_pairs=None, seconds={}, report=None, **first_look)
        for i in range(3)
    )
    own = history_with_gate(history, report)[-1]
    assert (own.pass_rate, own.harmful_rate, own.over_refusal_rate) == (0.61, 0.031, 0.1)
    assert (own.win_rate_previous, own.win_rate_previous_ci, own.win_rate_anchor) == (0.57, (0.52, 0.62), 0.7)
    assert history_with_gate(history, report)[:2] == history[:2]
    html = render_report(RoundData(run_id="r", run_dir="r", round=2, gate=report, history=history))
    assert "win rate against previous 57.0 % 52.0 to 62.0 %" in Page(html).text
    assert "Pass rate by round. pass rate: 50.0 % at 0, 61.0 % at 2" in html


def churned(temperature_noise: float, num: int) -> GateReport:
    """What the gate itself says of so much churn on so many prompts."""
    given = [case(Side.HARMFUL, "rrr", ask=str(i)) for i in range(num)]
    rows = [row for it in given for row in it.rows.values()]
    config = GateConfig(
        checks=(CheckConfig(id="harm_vs_previous", metric="harmful_rate", rule="non_inferior", vs="previous", margin=0.05),)
    )
    context = Context(candidate=REF, previous=REF, anchor=REF, run_id="r", round=2, churn={"harmful_rate": temperature_noise})
    return judge_candidate(Evidence([it.prompt for it in given], rows, [], alpha=0.05), config, context)


def test_an_evaluation_that_an_unchanged_candidate_often_fails_is_worth_a_look() -> None:
    noisy, quiet = churned(0.4, 200), churned(0.02, 400)
    told = passing_chance(noisy)
    assert told is not None
    assert told[0] == "harm_vs_previous"
    assert told[1] < 0.8
    assert f"look A candidate as good as its reference passes harm_vs_previous only {100 * told[1]:.0f} times in 100" in text_of(
        noisy
    )
    assert "lower answering.temperature , or widen the margin" in text_of(noisy)
    assert passing_chance(quiet) is None
    assert " look " not in text_of(quiet)


def test_names_and_commands_hide_nothing() -> None:
    html = render_report(RoundData(run_id="a\u202eb", run_dir="runs/\u3164x", round=2, gate=gate()))
    assert not set(html) & set("\u202e\u3164")
    page = Page(html)
    assert page.text.startswith("a⟨U+202E⟩b round 2: PASS a⟨U+202E⟩b, round 2")
    assert "dpo-loop show 'runs/⟨U+3164⟩x' 2" in page.text


def test_rounds_with_another_anchor_are_no_series() -> None:
    rates: dict[str, Any] = {"pass_rate": 0.5, "harmful_rate": 0.1, "over_refusal_rate": 0.1, "win_rate_previous": 0.5}
    history = tuple(
        RoundSummary(
            round=i,
            parent=None,
            gate=None,
            promoted=True,
            num_pairs=None,
            seconds={},
            report=None,
            win_rate_anchor=0.5 + i / 100,
            anchor_round=int(i > 2),
            **rates,
        )
        for i in range(1, 5)
    )
    html = render_report(RoundData(run_id="r", run_dir="r", round=4, gate=gate(round=4), history=history))
    assert "vs anchor: 53.0 % at 3, 54.0 % at 4" in html
