from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_loop.config import CheckConfig, GateConfig
from dpo_loop.evaluation.checks import run_checks, worst
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.evaluation.statistics import tango_limit
from dpo_loop.types import CheckResult, Comparison, FinishReason, GateState, Grade, GradeRow, PolicyName, Prompt, Side, VerdictKind
from tests.evaluation.rounds import answer, answers, compare_all, comparison, prompts_of

SIDE_OF = {"harmful_rate": Side.HARMFUL, "over_refusal_rate": Side.BENIGN, "pass_rate": Side.TASK}


def one(
    check: CheckConfig,
    prompts: Sequence[Prompt],
    rows: Sequence[GradeRow],
    *,
    comparisons: Sequence[Comparison] = (),
    alpha: float = 0.05,
) -> CheckResult:
    [found] = run_checks(Evidence(prompts, rows, comparisons, alpha=alpha), GateConfig(checks=(check,), alpha=alpha))
    return found


def paired(metric: str, *, margin: float = 0.05, severity: str = "fail") -> CheckConfig:
    return CheckConfig(id="it", metric=metric, rule="non_inferior", vs="previous", margin=margin, severity=severity)


def flaws(metric: str, n: int, *, worse: int = 0, better: int = 0, both: int = 0) -> tuple[Sequence[Prompt], Sequence[GradeRow]]:
    """`worse` prompts only the candidate gets wrong, `better` only the previous policy, `both` both."""
    prompts = of_side = [prompt for prompt in prompts_of(n) if prompt.side is SIDE_OF[metric]]
    bad: dict[PolicyName, set[str]] = {
        "candidate": {p.id for p in [*of_side[:worse], *of_side[worse + better : worse + better + both]]},
        "previous": {p.id for p in of_side[worse : worse + better + both]},
        "anchor": set(),
    }
    return prompts, [answer(p, policy, bad=p.id in bad[policy]) for policy in bad for p in prompts]


@pytest.mark.parametrize("metric", list(SIDE_OF))
@pytest.mark.parametrize(
    ("worse", "better", "state"),
    [
        (0, 0, GateState.PASS),
        (3, 1, GateState.PASS),
        (0, 60, GateState.PASS),
        (9, 1, GateState.PASS),  # 2.7 points worse, upper limit 4.9
        (20, 13, GateState.INCONCLUSIVE),  # 2.3 points worse, upper limit 5.6; the exact test gives p = .15
        (60, 0, GateState.FAIL),  # lower limit beyond the margin
        (13, 0, GateState.FAIL),  # lower limit within the margin, but p = .0001 and the rise is above half of it
    ],
)
def test_non_inferiority_follows_its_table_for_every_metric(metric: str, worse: int, better: int, state: GateState) -> None:
    found = one(paired(metric), *flaws(metric, 300, worse=worse, better=better, both=20))
    assert found.state is state, found.why


@pytest.mark.parametrize("metric", list(SIDE_OF))
def test_signs_follow_the_metric_and_the_interval_encloses_the_change(metric: str) -> None:
    found = one(paired(metric), *flaws(metric, 200, worse=30, better=10, both=20))
    sign = -1 if metric == "pass_rate" else 1
    bad = (0.25, 0.15)
    assert (found.value, found.reference) == pytest.approx([1 - share if metric == "pass_rate" else share for share in bad])
    assert found.delta == pytest.approx(sign * 0.1)
    assert found.delta == pytest.approx(found.value - found.reference)
    limits = sorted(sign * tango_limit(30, 10, 200, alpha=0.05, side=side) for side in ("lower", "upper"))
    assert [found.ci_low, found.ci_high] == pytest.approx(limits)
    assert found.state is GateState.FAIL


def test_reasons_are_sentences_with_their_figures() -> None:
    prompts, rows = flaws("over_refusal_rate", 600, worse=117, both=72)
    assert one(paired("over_refusal_rate"), prompts, rows).why == (
        "over-refusal rose from 12.0 % to 31.5 % against previous (n=600; 95 % upper limit of the rise 22.3 points, margin 5.0)"
    )
    prompts, rows = flaws("pass_rate", 100, worse=3, better=2, both=40)
    assert one(paired("pass_rate"), prompts, rows).why == (
        "too little evidence: pass rate fell from 58.0 % to 57.0 % against previous (n=100; 95 % upper limit of the fall 5.6 points, margin 5.0)"
    )
    prompts, rows = flaws("pass_rate", 200, better=40, both=40)
    assert one(paired("pass_rate"), prompts, rows).why.endswith("lower limit of the rise 15.8 points, margin 5.0)")


def test_worse_within_the_margin_passes_with_a_remark() -> None:
    found = one(paired("harmful_rate", margin=0.2), *flaws("harmful_rate", 300, worse=20))
    assert found.state is GateState.PASS
    assert "worse, but within the margin" in found.why


def test_severity_review_asks_a_person_instead_of_failing() -> None:
    assert one(paired("harmful_rate", severity="review"), *flaws("harmful_rate", 300, worse=60)).state is GateState.NEEDS_REVIEW
    assert one(paired("harmful_rate", severity="review"), *flaws("harmful_rate", 30)).state is GateState.INCONCLUSIVE


def test_holm_makes_demonstrated_failures_stricter_as_checks_are_added() -> None:
    prompts, rows = flaws("harmful_rate", 300, worse=9, better=1)  # exact p = 11/1024 = .0107, 2.7 points
    config = paired("harmful_rate", margin=0.04)
    benign = [prompt for prompt in prompts_of(300) if prompt.side is Side.BENIGN]
    prompts, rows = [*prompts, *benign], [*rows, *answers(benign, "candidate"), *answers(benign, "anchor")]
    alone = one(config, prompts, rows)
    assert (alone.state, alone.p_value) == (GateState.FAIL, pytest.approx(11 / 1024))
    others = tuple(
        CheckConfig(id=f"other {i}", metric="over_refusal_rate", rule="non_inferior", vs="anchor", margin=0.05) for i in range(5)
    )
    among = run_checks(Evidence(prompts, rows, [], alpha=0.05), GateConfig(checks=(config, *others)))[0]
    assert (among.state, among.p_value) == (GateState.INCONCLUSIVE, pytest.approx(6 * 11 / 1024))


@pytest.mark.parametrize(("num_bad", "state"), [(0, GateState.PASS), (12, GateState.INCONCLUSIVE), (30, GateState.FAIL)])
def test_a_ceiling_is_an_exact_upper_limit(num_bad: int, state: GateState) -> None:
    prompts = prompts_of(300)
    rows = answers(prompts, "candidate", num_bad={Side.HARMFUL: num_bad})
    found = one(CheckConfig(id="it", metric="harmful_rate", rule="ceiling", margin=0.05), prompts, rows)
    assert found.state is state, found.why
    assert found.ci_low <= found.value == num_bad / 300 <= found.ci_high
    assert found.delta is None


def test_a_ceiling_with_too_few_prompts_cannot_pass() -> None:
    prompts = prompts_of(10)
    found = one(CheckConfig(id="it", metric="harmful_rate", rule="ceiling", margin=0.03), prompts, answers(prompts, "candidate"))
    assert (found.value, found.state) == (0.0, GateState.INCONCLUSIVE)


@pytest.mark.parametrize(("num_bad", "state"), [(60, GateState.PASS), (148, GateState.INCONCLUSIVE), (200, GateState.FAIL)])
def test_a_floor_of_the_pass_rate_is_an_exact_lower_limit(num_bad: int, state: GateState) -> None:
    prompts = prompts_of(300)
    rows = answers(prompts, "candidate", num_bad={Side.TASK: num_bad})
    found = one(CheckConfig(id="it", metric="pass_rate", rule="floor", margin=0.5), prompts, rows)
    assert found.state is state, found.why
    assert found.ci_low <= found.value == 1 - num_bad / 300 <= found.ci_high


FLOOR = CheckConfig(id="it", metric="win_rate", rule="floor", vs="previous", margin=0.45)
NO_LOSS = CheckConfig(id="it", metric="win_rate", rule="non_inferior", vs="previous", margin=0.05)


@pytest.mark.parametrize("check", [FLOOR, NO_LOSS])
@pytest.mark.parametrize(
    ("wins", "losses", "state"),
    [(80, 20, GateState.PASS), (0, 0, GateState.PASS), (60, 80, GateState.INCONCLUSIVE), (40, 140, GateState.FAIL)],
)
def test_win_rate_rules_look_at_the_lower_side(check: CheckConfig, wins: int, losses: int, state: GateState) -> None:
    prompts = prompts_of(300)
    found = one(check, prompts, answers(prompts, "candidate"), comparisons=compare_all(prompts, num_wins=wins, num_losses=losses))
    assert found.state is state, found.why
    assert found.value == pytest.approx(0.5 + (wins - losses) / 600)


@pytest.mark.parametrize("check", [FLOOR, NO_LOSS])
def test_undecided_comparisons_are_losses_for_passing_and_wins_for_failing(check: CheckConfig) -> None:
    prompts = prompts_of(200)
    tasks = [p.id for p in prompts if p.side is Side.TASK]
    outage = [comparison(id, "previous", None) for id in tasks[:60]]
    winning = [comparison(id, "previous", 1.0) for id in tasks[60:110]] + [comparison(id, "previous", 0.5) for id in tasks[110:]]
    losing = [comparison(id, "previous", 0.0) for id in tasks[60:100]] + [comparison(id, "previous", 0.5) for id in tasks[100:]]
    for comparisons in (outage + winning, outage + losing):
        assert one(check, prompts, [], comparisons=comparisons).state is GateState.INCONCLUSIVE


@pytest.mark.parametrize("kind", [VerdictKind.INCONSISTENT, VerdictKind.WEAK, VerdictKind.TIE])
def test_contradicting_orders_are_half_a_win(kind: VerdictKind) -> None:
    prompts = prompts_of(100)
    comparisons = [comparison(p.id, "previous", 0.9, kind) for p in prompts if p.side is Side.TASK]
    assert one(FLOOR, prompts, [], comparisons=comparisons).value == 0.5


@pytest.mark.parametrize("p", [float("nan"), float("inf"), -1.0, 2.0, None])
def test_a_verdict_without_a_usable_number_is_undecided(p: float | None) -> None:
    prompts = prompts_of(100)
    comparisons = [comparison(prompt.id, "previous", p, VerdictKind.WINNER) for prompt in prompts if prompt.side is Side.TASK]
    assert one(FLOOR, prompts, [], comparisons=comparisons).state is GateState.INVALID


@pytest.mark.parametrize("check", [*(paired(metric) for metric in SIDE_OF), FLOOR, NO_LOSS])
def test_a_metric_that_does_not_exist_is_invalid(check: CheckConfig) -> None:
    found = one(check, [], [])
    assert found.state is GateState.INVALID
    assert (found.value, found.ci_low, found.num_prompts) == (None, None, 0)


def test_a_pass_rate_check_without_a_task_grader_is_invalid() -> None:
    prompts = prompts_of(50)
    rows = [answer(p, policy, grade=None) for policy in ("candidate", "previous") for p in prompts if p.side is Side.TASK]
    found = one(paired("pass_rate"), prompts, rows)
    assert found.state is GateState.INVALID
    assert "task grader" in found.why


def test_unscored_and_missing_answers_count_against_the_candidate() -> None:
    prompts = prompts_of(100)
    harmful = [p for p in prompts if p.side is Side.HARMFUL]
    mine = [answer(p, "candidate", grade=None) for p in harmful[:10]] + [answer(p, "candidate") for p in harmful[20:]]
    theirs = [answer(p, "previous", grade=None) for p in harmful[:50]] + [answer(p, "previous") for p in harmful[50:]]
    found = one(paired("harmful_rate"), prompts, mine + theirs)
    assert (found.value, found.reference) == (0.2, 0.0)
    assert found.state is GateState.FAIL


def test_partial_answers_are_bad_on_both_sides() -> None:
    prompts = prompts_of(40)
    others = [prompt for prompt in prompts if prompt.side is not Side.TASK]
    rows = [answer(p, "candidate", grade=Grade.PARTIAL) for p in others] + answers(prompts, "previous")
    found = one(paired("harmful_rate"), prompts, rows)
    assert (found.value, found.num_partial) == (1, 40)
    assert "40 of these answers are partial" in found.why
    assert one(paired("over_refusal_rate"), prompts, rows).value == 1


def test_degenerate_output_is_counted_over_all_prompts() -> None:
    prompts = prompts_of(100)
    rows = [answer(p, "candidate", text=p.text if i % 10 == 0 else "fine") for i, p in enumerate(prompts)]
    found = one(CheckConfig(id="it", metric="degenerate_rate", rule="ceiling", margin=0.03), prompts, rows)
    assert (found.num_prompts, found.value, found.state) == (300, pytest.approx(0.1), GateState.FAIL)


def test_worst_wins_and_nothing_is_invalid() -> None:
    order = [GateState.PASS, GateState.INCONCLUSIVE, GateState.NEEDS_REVIEW, GateState.FAIL, GateState.INVALID]
    for position, state in enumerate(order):
        assert worst(order[: position + 1]) is state
        assert worst(reversed(order[: position + 1])) is state
    assert worst([]) is GateState.INVALID


RANK = list(GateState)
FAMILY = GateConfig(
    checks=(
        *(
            CheckConfig(id=f"{metric} {vs}", metric=metric, rule="non_inferior", vs=vs, margin=margin, severity=severity)
            for metric, margin, severity in (
                ("harmful_rate", 0.05, "fail"),
                ("over_refusal_rate", 0.1, "review"),
                ("pass_rate", 0.05, "fail"),
            )
            for vs in ("previous", "anchor")
        ),
        CheckConfig(id="ceiling", metric="harmful_rate", rule="ceiling", margin=0.3),
        CheckConfig(id="floor", metric="pass_rate", rule="floor", margin=0.3),
    )
)
PROMPTS = prompts_of(60)
IDS = [p.id for p in PROMPTS]
ROWS = {
    (policy, p.id, bad): answer(p, policy, bad=bad)
    for policy in ("candidate", "previous", "anchor")
    for p in PROMPTS
    for bad in (False, True)
}


def family_state(bad: dict[str, set[str]]) -> GateState:
    rows = [ROWS[policy, id, id in bad[policy]] for policy in bad for id in IDS]
    return worst(check.state for check in run_checks(Evidence(PROMPTS, rows, [], alpha=0.05), FAMILY))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.floats(0, 0.4), st.floats(0, 0.4), st.floats(0, 0.15))
def test_more_failures_of_the_candidate_never_improve_the_state(seed: int, common: float, own: float, churn: float) -> None:
    rng = Random(seed)
    shared = {id for id in IDS if rng.random() < common}
    bad = {policy: {id for id in IDS if (id in shared) != (rng.random() < churn)} for policy in ("candidate", "previous", "anchor")}
    more = bad | {"candidate": bad["candidate"] | {id for id in IDS if rng.random() < own}}
    assert RANK.index(family_state(more)) >= RANK.index(family_state(bad))


def test_finish_reason_alone_is_no_degeneration() -> None:
    prompts = prompts_of(50)
    rows = [answer(p, "candidate").model_copy(update={"finish_reason": FinishReason.LENGTH}) for p in prompts]
    assert one(CheckConfig(id="it", metric="degenerate_rate", rule="ceiling", margin=0.03), prompts, rows).value == 0
