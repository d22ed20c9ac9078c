"""Evaluation cases by hand, for tests of one panel."""

from __future__ import annotations

from typing import Any

from dpo_loop.reporting.answers import Case
from dpo_loop.reporting.health import StageFigures
from dpo_loop.types import (
    CheckResult,
    Comparison,
    FinishReason,
    GateReport,
    GateState,
    Grade,
    GradeRow,
    JudgeCanary,
    Message,
    PolicyRef,
    Prompt,
    PromptSet,
    Side,
    StageOutcome,
    Tally,
    VerdictKind,
)

GRADES = {"r": Grade.REFUSAL, "p": Grade.PARTIAL, "c": Grade.COMPLIANCE, "+": Grade.PASS, "-": Grade.FAIL, "?": None}
_POLICIES = ("anchor", "previous", "candidate")


def case(
    side: Side,
    grades: str,
    *,
    texts: tuple[str, ...] | None = None,
    category: str = "",
    tags: dict[str, str] | None = None,
    rationale: str = "",
    tokens: tuple[int, ...] = (10, 10, 10),
    finish: FinishReason = FinishReason.STOP,
    comparisons: dict[str, Comparison] | None = None,
    is_graded: bool = True,
    ask: str = "What is it?",
) -> Case:
    """grades: a letter each for anchor, previous and candidate, or the candidate's alone. texts: theirs."""
    policies = _POLICIES[-len(grades) :]
    told = texts or tuple(f"answer of {policy}" for policy in policies)
    prompt = Prompt.build((Message(role="user", content=ask),), source="test", tags={"side": side.value} | (tags or {}))
    rows: dict[Any, GradeRow] = {
        policy: GradeRow(prompt_id=prompt.id, side=side, category=category, policy=policy, response=text, num_tokens=num, finish_reason=finish,
                         grade=GRADES[letter], rationale=rationale)
        for policy, letter, text, num in zip(policies, grades, told, tokens, strict=False)
    }  # fmt: skip
    return Case(prompt, rows, comparisons or {}, is_graded)


def compared(vs: Any, p: float | None, kind: VerdictKind = VerdictKind.WINNER) -> Comparison:
    return Comparison(prompt_id="it", vs=vs, kind=kind, p_candidate=p, ballot_keys=())


# ------------------------------------------------------------------------------------- a gate report with all that it can hold

REF = PolicyRef(base="b", base_sha256="0" * 64)
CHECK = CheckResult(id="harm", metric="harmful_rate", rule="ceiling", vs=None, num_prompts=100, value=0.1, reference=None, delta=None,
                    ci_low=0.05, ci_high=0.2, margin=0.05, state=GateState.FAIL, why="too much harm")  # fmt: skip
PERPLEXITY = CheckResult(id="ppl", metric="perplexity", task="prose", rule="non_inferior", vs="anchor", num_prompts=40, value=12.5, reference=12.0,
                         delta=0.0417, ci_low=0.03, ci_high=0.048, margin=0.05, state=GateState.PASS, why="perplexity rose")  # fmt: skip
CANARY = JudgeCanary(grader="guard-8b", num_rows=60, num_right=57, num_ungraded=1, accuracy=0.95, kappa=0.912, sensitivity=0.97,
                     specificity=None, by_kind={"refusal": (20, 20), "partial_refusal": (8, 10)})  # fmt: skip
PROMPT_SETS = (
    PromptSet(source="builtin:core-v1", licence="CC0-1.0", num_prompts=420, sha256="ab" * 32),
    PromptSet(source="hub:some/set", revision="f" * 40, num_prompts=0, skipped="no network"),
)
CONDITIONS = {
    "prompts_sha256": "cd" * 32,
    "template_sha256": "ef" * 32,
    "decoding": {"temperature": 0.0, "max_new_tokens": 256},
    "engine": {"max_model_len": 4096, "extra": {"enforce_eager": True}},
    "versions": {"vllm": "0.32.0"},
}


def gate(state: GateState = GateState.PASS, **changes: Any) -> GateReport:
    made = GateReport(run_id="r", round=2, state=state, reasons=("all is well",), candidate=REF, previous=REF, anchor=REF,
                      validity=({"id": "coverage", "state": "PASS", "why": "all answered"},), checks=(), rates={}, created_at="")  # fmt: skip
    return made.model_copy(update=changes)


def full_gate() -> GateReport:
    waived = CHECK.model_copy(update={"waived_by": "ann until round 4: known, mended soon", "design_effect": 1.7, "mde": 0.04})
    return gate(
        checks=(waived, PERPLEXITY),
        judge_canary=CANARY,
        churn={"harmful_rate": 0.015, "over_refusal_rate": 0.02},
        conditions=CONDITIONS,
        prompt_sets=PROMPT_SETS,
        previous_report_sha256="1" * 64,
        config_sha256="2" * 64,
        topped_up=True,
    )


def figures(name: str, *tallies: Tally, **metrics: Any) -> StageFigures:
    return StageFigures(name, StageOutcome(tallies=tallies, metrics=metrics))


def full_figures() -> tuple[StageFigures, ...]:
    money = {
        "judge": "big-judge",
        "calls_asked": 1200,
        "calls_from_ledger": 34,
        "input_tokens": 912_000,
        "output_tokens": 80_000,
        "cost_usd": 1.25,
    }
    agreement = {"big and small": {"num": 500, "agree": 0.81, "kappa": 0.62}}
    verdicts = Tally(of="prompts", total=800, parts={"winner": 561, "tie": 120, "inconsistent": 79, "undecided": 40})
    return (
        figures("judging", verdicts, consistency=0.72, first_position_win_rate=0.66, longer_win_rate=0.58, tie_rate=0.15, agreement=agreement,
                undecided_calls={"over_budget": 2}, **money),
        figures("pairing", Tally(of="prompts", total=800, parts={"pairs": 512, "tie": 288}), chosen_longer_rate=0.7),
    )  # fmt: skip
