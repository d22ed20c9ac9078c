"""From a judge's text to an outcome: read once, whole, against the schema. What does not fit is undecided, never a guess."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo_loop.types import Ballot, Classified, Decided, Graded, Outcome, Prompt, SafetyLabel, Undecided, UndecidedReason
from judges.backend import BackendSpec, JudgeRequest, Question, Reply


class _Raw(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Verdict(_Raw):
    winner: Literal["A", "B", "tie"]


class _VerdictWithRationale(_Verdict):
    rationale: str


class _Grade(_Raw):
    grade: int = Field(ge=1, le=10)


class _GradeWithRationale(_Grade):
    rationale: str


class _Class(_Raw):
    label: SafetyLabel


class _ClassWithRationale(_Class):
    rationale: str


_SHAPES: dict[Question, tuple[type[_Raw], type[_Raw]]] = {
    Question.COMPARE: (_Verdict, _VerdictWithRationale),
    Question.GRADE: (_Grade, _GradeWithRationale),
    Question.CLASSIFY: (_Class, _ClassWithRationale),
}
"""Without and with a rationale."""
_P_LEFT = {"A": 1.0, "B": 0.0, "tie": 0.5}


def parse_reply(text: str, request: JudgeRequest, *, rationale: bool = True) -> Outcome:
    """The outcome that a schema-constrained reply states: a verdict, or of one answer alone a class, or a grade g in 1..10, quality (g - 1) / 9.

    There is no fallback that looks for a letter in prose: such a search finds what a candidate wrote (inspect_ai#4697).
    """
    plain, with_rationale = _SHAPES[request.question]
    shape = with_rationale if rationale else plain
    try:
        # strict=False: under a schema with maxLength, vLLM's grammar lets a model write a raw newline into the rationale.
        said = shape.model_validate(json.loads(text, object_pairs_hook=_once_each, strict=False))
    except ValidationError as error:
        return Undecided(reason=UndecidedReason.MALFORMED, detail=f"not a verdict: {error.errors()[0]['msg']}")
    except (ValueError, RecursionError) as error:
        return Undecided(reason=UndecidedReason.MALFORMED, detail=f"not a verdict: {error}")
    why = getattr(said, "rationale", "")
    match said:
        case _Verdict():
            return Decided(p_left=_P_LEFT[said.winner], rationale=why)
        case _Grade():
            return Graded(quality=(said.grade - 1) / 9, rationale=why)
        case _Class():
            return Classified(label=said.label, rationale=why)
        case _:
            raise TypeError(f"no outcome is made of a {type(said).__name__}")


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON lets a name stand twice and parsers take the last; a verdict that names two winners names none."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def ballot_of(key: str, *, prompt: Prompt, left_id: str, right_id: str | None, judge: BackendSpec, reply: Reply) -> Ballot:
    """The ids are those of the caller: the same two texts may be another run's completions, and the ledger serves both."""
    return Ballot(
        key=key,
        prompt_id=prompt.id,
        left_id=left_id,
        right_id=right_id,
        outcome=reply.outcome,
        judge=judge.name,
        family=judge.family,
        served_model=reply.served_model,
        raw=reply.raw,
        usage=reply.usage,
        cost_usd=reply.cost_usd,
        latency_s=reply.latency_s,
        request_id=reply.request_id,
        attempts=reply.attempts,
    )
