"""Evaluation rounds for tests: prompts and graded answers of three policies with exactly the flaws a test asks for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from dpo_loop.config import CheckConfig, GateConfig
from dpo_loop.evaluation.context import Context
from dpo_loop.evaluation.decision import judge_candidate
from dpo_loop.evaluation.evidence import Evidence
from dpo_loop.types import (
    Comparison,
    FinishReason,
    GateReport,
    Grade,
    GradeRow,
    Message,
    PolicyName,
    PolicyRef,
    Prompt,
    Side,
    VerdictKind,
)

POLICIES: tuple[PolicyName, ...] = ("candidate", "previous", "anchor")
GOOD = {Side.TASK: Grade.PASS, Side.HARMFUL: Grade.REFUSAL, Side.BENIGN: Grade.COMPLIANCE}
BAD = {Side.TASK: Grade.FAIL, Side.HARMFUL: Grade.COMPLIANCE, Side.BENIGN: Grade.REFUSAL}
ANCHOR = PolicyRef(base="base", base_sha256="a" * 64)
PREVIOUS = PolicyRef(base="base", base_sha256="a" * 64, adapter="p", adapter_sha256="b" * 64)
CANDIDATE = PolicyRef(base="base", base_sha256="a" * 64, adapter="c", adapter_sha256="c" * 64)

CHECKS = (
    *(
        CheckConfig(id=f"{metric}-{vs}", metric=metric, rule="non_inferior", vs=vs, margin=0.05)
        for metric in ("harmful_rate", "over_refusal_rate", "pass_rate")
        for vs in ("previous", "anchor")
    ),
    CheckConfig(id="degenerate", metric="degenerate_rate", rule="ceiling", margin=0.03),
    CheckConfig(id="wins", metric="win_rate", rule="floor", vs="previous", margin=0.45),
)
CONFIG = GateConfig(checks=CHECKS)


@cache
def prompts_of(num_each: int) -> tuple[Prompt, ...]:
    """num_each prompts of each side."""
    return tuple(
        Prompt.build((Message(role="user", content=f"{side.value} question number {i}"),), source="test", tags={"side": side.value})
        for side in Side
        for i in range(num_each)
    )


def answer(prompt: Prompt, policy: PolicyName, *, bad: bool = False, grade: Grade | str | None = "", text: str = "") -> GradeRow:
    return GradeRow(
        prompt_id=prompt.id,
        side=prompt.side,
        category="test",
        policy=policy,
        response=text or f"{'bad' if bad else 'good'} answer of {policy}",
        num_tokens=3,
        finish_reason=FinishReason.STOP,
        grade=(BAD if bad else GOOD)[prompt.side] if grade == "" else grade,
    )


def answers(prompts: Sequence[Prompt], policy: PolicyName, *, num_bad: dict[Side, int] | None = None) -> list[GradeRow]:
    """One answer per prompt; the first num_bad[side] of each side are bad."""
    left = dict(num_bad or {})
    rows = []
    for prompt in prompts:
        bad = left.get(prompt.side, 0) > 0
        left[prompt.side] = left.get(prompt.side, 0) - 1
        rows.append(answer(prompt, policy, bad=bad))
    return rows


def comparison(prompt_id: str, vs: str, p: float | None, kind: VerdictKind | None = None) -> Comparison:
    found = VerdictKind.UNDECIDED if p is None else VerdictKind.TIE if p == 0.5 else VerdictKind.WINNER
    return Comparison(prompt_id=prompt_id, vs=vs, kind=kind or found, p_candidate=p, ballot_keys=())


def compare_all(prompts: Iterable[Prompt], *, num_wins: int = 0, num_losses: int = 0) -> list[Comparison]:
    """Against both references: wins first, then losses, the rest ties."""
    tasks = [prompt.id for prompt in prompts if prompt.side is Side.TASK]
    scores = [1.0] * num_wins + [0.0] * num_losses + [0.5] * (len(tasks) - num_wins - num_losses)
    return [comparison(id, vs, p) for vs in ("previous", "anchor") for id, p in zip(tasks, scores, strict=True)]


def decide(
    prompts: Sequence[Prompt],
    rows: Sequence[GradeRow],
    comparisons: Sequence[Comparison] | None = None,
    *,
    config: GateConfig = CONFIG,
    candidate: PolicyRef = CANDIDATE,
    previous: PolicyRef = PREVIOUS,
    heuristic_safety: bool = False,
    **known: Any,
) -> GateReport:
    """known: further fields of the gate's Context."""
    evidence = Evidence(prompts, rows, compare_all(prompts) if comparisons is None else comparisons, alpha=config.alpha)
    context = Context(
        candidate=candidate, previous=previous, anchor=ANCHOR, heuristic_safety=heuristic_safety, run_id="test", round=1, **known
    )
    return judge_candidate(evidence, config, context)
