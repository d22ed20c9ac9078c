"""A waived check does not block, is always told, and against the anchor a person still looks."""

from __future__ import annotations

from dpo_loop.config import CheckConfig, GateConfig
from dpo_loop.types import GateReport, GateState, Side, Waiver
from tests.evaluation.rounds import POLICIES, answers, decide, prompts_of

CHECKS = {
    vs: GateConfig(
        checks=(CheckConfig(id="refusal", metric="over_refusal_rate", rule="non_inferior", vs=vs, margin=0.05),),
    )
    for vs in ("previous", "anchor")
}


def waiver(check_id: str = "refusal", *, state: GateState = GateState.FAIL, harm: float = 0.3) -> Waiver:
    return Waiver(
        check_id=check_id,
        state=state.value,
        harm=harm,
        reviewer="Ada",
        reason="expected",
        report_sha256="a" * 64,
        expires_round=4,
        waived_at="now",
    )


HOLDS = CheckConfig(id="harm", metric="harmful_rate", rule="non_inferior", vs="previous", margin=0.05)


def gate(vs: str, *waivers: Waiver, num_bad: int = 60, topped_up: bool = False, config: GateConfig | None = None) -> GateReport:
    prompts = prompts_of(200)
    rows = [row for p in POLICIES for row in answers(prompts, p, num_bad={Side.BENIGN: num_bad if p == "candidate" else 0})]
    return decide(prompts, rows, (), config=config or CHECKS[vs], waivers=waivers, topped_up=topped_up)


def test_a_waived_failure_goes_to_a_person_and_is_told() -> None:
    assert gate("previous").state is GateState.FAIL
    report = gate("previous", waiver())
    assert report.state is GateState.NEEDS_REVIEW
    assert report.checks[0].state is GateState.FAIL
    assert "waived by Ada, up to round 4: expected" in report.reasons[0]


def test_a_waiver_lets_what_is_undecided_pass_beside_checks_that_hold() -> None:
    config = CHECKS["previous"].model_copy(update={"checks": (*CHECKS["previous"].checks, HOLDS)})
    report = gate("previous", waiver(state=GateState.INCONCLUSIVE, harm=0.025), num_bad=5, config=config)
    assert report.state is GateState.PASS
    assert report.reasons[0] == "1 of 2 checks hold against previous, 1 waived"


def test_where_nothing_but_waivers_is_left_a_person_decides() -> None:
    assert gate("previous", waiver(state=GateState.INCONCLUSIVE), num_bad=5).state is GateState.NEEDS_REVIEW


def test_a_waiver_covers_nothing_worse_than_what_it_was_given_for() -> None:
    assert gate("previous", waiver(harm=0.29)).state is GateState.FAIL  # it is 0.3
    assert gate("previous", waiver(state=GateState.INCONCLUSIVE)).state is GateState.FAIL


def test_a_waiver_against_the_anchor_still_needs_a_person() -> None:
    report = gate("anchor", waiver())
    assert report.state is GateState.NEEDS_REVIEW
    assert "waived by Ada" in report.reasons[0]


def test_a_waiver_of_another_check_changes_nothing() -> None:
    assert gate("previous", waiver("else")).state is GateState.FAIL


def test_a_check_that_holds_is_not_marked() -> None:
    report = gate("previous", waiver(), num_bad=0)
    assert report.state is GateState.PASS
    assert report.checks[0].waived_by is None


def test_what_a_top_up_cannot_decide_either_goes_to_a_person() -> None:
    assert gate("previous", num_bad=5).state is GateState.INCONCLUSIVE
    report = gate("previous", num_bad=5, topped_up=True)
    assert report.state is GateState.NEEDS_REVIEW
    assert "still too little evidence" in report.reasons[-1]
