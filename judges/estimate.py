"""What judging a round will cost, before it starts: calls, tokens and dollars of every remote judge.

likely     answers half as long as they may be, 4 bytes a token, a rationale of ordinary length
at most    answers as long as they may be and bytes a token as the budget reckons them: what would be set aside. A call that has
           to be asked again costs more, and the budget's caps hold for that too.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dpo_loop.types import Message, Prompt, Side, Usage
from judges.accounts import BudgetConfig
from judges.backend import JudgeRequest
from judges.budget import BYTES_PER_TOKEN
from judges.canary import rows_for
from judges.config import (
    GuardGrader,
    Judge,
    JudgeGrader,
    Knockout,
    PanelJudge,
    Pointwise,
    RemoteJudge,
    RemoteModel,
    RoundRobin,
    SafetyGrader,
    Selection,
    grader_of,
    members_of,
)
from judges.guards import FORMS
from judges.knockout import best_and_worst
from judges.prices import FREE, to_usd
from judges.rubric import REFERENCE_TAG, load_rubric, render, reply_in_json, schema_of
from judges.safety import name_of

LIKELY_BYTES_PER_TOKEN = 4.0
LIKELY_RATIONALE_TOKENS = 120
VERDICT_TOKENS = 12
_DRAWS = 64


@dataclass(frozen=True, slots=True)
class Work:
    """looks: calls to the first judge for each prompt that select; each prompt is then decided in both orders.

    is_classified: there is one answer to each prompt, which is classified in one call instead. prompt_bytes: of one conversation.
    answer_tokens: the most that an answer can have.
    """

    what: str
    judge: Judge | GuardGrader
    num_prompts: int
    looks: int
    prompt_bytes: int
    answer_tokens: int
    is_classified: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """Of one judge and one kind of work. Dollars are 0 for a judge that says `free`."""

    what: str
    judge: str
    calls: int
    calls_at_most: int
    input_tokens: int
    output_tokens: int
    usd: float
    usd_at_most: float


def safety_works(safety: SafetyGrader, num_prompts: Mapping[Side, int], *, prompt_bytes: int, answer_tokens: int) -> list[Work]:
    """Of grading the candidate's answers for safety, the judge canary included. num_prompts: of the evaluation, by side.

    The answers of previous and anchor were graded when they were candidates, and cost nothing again unless the grader has changed.
    """
    canary = Counter(row.side for row in rows_for(safety))
    works: dict[str, Work] = {}
    for side in (Side.HARMFUL, Side.BENIGN):
        grader = grader_of(safety, side)
        if not isinstance(grader, JudgeGrader | GuardGrader):
            continue
        num = num_prompts.get(side, 0) + canary[side]
        before = works.get(name_of(grader))
        works[name_of(grader)] = Work(
            what=f"safety by {name_of(grader)}: one answer to each prompt, and the judge canary",
            judge=grader.judge if isinstance(grader, JudgeGrader) else grader,
            num_prompts=num + (before.num_prompts if before else 0),
            looks=0,
            prompt_bytes=prompt_bytes,
            answer_tokens=answer_tokens,
            is_classified=True,
        )
    return list(works.values())


def looks_of(selection: Selection, k: int) -> int:
    """Selecting calls for k different answers, at most."""
    match selection:
        case Knockout():
            return max(_matches(k, seed) for seed in range(_DRAWS)) if k > 1 else 0
        case RoundRobin():
            return k * (k - 1)
        case Pointwise():
            return k


def _matches(k: int, seed: int) -> int:
    """Of a real draw: with an odd number the losers' round depends on it."""
    num = 0

    async def match(first: str, second: str) -> float | None:
        nonlocal num
        num += 1
        return float(first < second)

    asyncio.run(best_and_worst([str(n) for n in range(k)], random.Random(seed), match))
    return num


def estimate(works: Sequence[Work], budget: BudgetConfig) -> list[Row]:
    """Raises InputError for a model without a price that does not say `free`, and for a rubric that is none."""
    return [row for work in works for row in _rows(work, budget)]


def _rows(work: Work, budget: BudgetConfig) -> Iterator[Row]:
    judge = work.judge
    asked_always = judge.min_families if isinstance(judge, PanelJudge) else 1
    for index, member in enumerate((judge,) if isinstance(judge, GuardGrader) else members_of(judge)):
        if not isinstance(member, RemoteModel):
            continue
        looks = work.looks if index == 0 else 0
        orders = 1 if work.is_classified else 2
        calls = work.num_prompts * (looks + (orders if index < asked_always else 0))
        most = work.num_prompts * (looks + orders)
        price = FREE if member.free else budget.price_list().of(member.model)
        likely_in = round(_body_bytes(member, work, answer_share=0.5) / LIKELY_BYTES_PER_TOKEN)
        most_in = round(_body_bytes(member, work, answer_share=1.0) / BYTES_PER_TOKEN)
        likely_out, most_out = _output_tokens(member)
        in_batches = member.batch is not None
        yield Row(
            what=work.what,
            judge=f"{member.kind}:{member.model}",
            calls=calls,
            calls_at_most=most,
            input_tokens=calls * likely_in,
            output_tokens=calls * likely_out,
            usd=to_usd(calls * price.of(Usage(input_tokens=likely_in, output_tokens=likely_out), at_batch_price=in_batches)),
            usd_at_most=to_usd(most * price.most(most_in, most_out, at_batch_price=in_batches)),
        )


def _body_bytes(model: RemoteModel, work: Work, *, answer_share: float) -> int:
    """Of a request as it would be sent, with stand-ins of the right length."""
    answer = "x" * round(answer_share * work.answer_tokens * LIKELY_BYTES_PER_TOKEN)
    tags = {REFERENCE_TAG: "x" * 64}
    prompt = Prompt.build((Message(role="user", content="x" * max(1, work.prompt_bytes)),), source="estimate", tags=tags)
    right = None if work.is_classified else answer
    request = JudgeRequest(key="0" * 64, prompt=prompt, left=answer, right=right, is_classified=work.is_classified)
    return len(json.dumps(_shown(model, request))) + len(model.model)


def _shown(model: RemoteModel, request: JudgeRequest) -> Any:
    match model:
        case RemoteJudge(rationale=rationale):
            how_to_reply = reply_in_json(request, rationale=rationale)
            return [render(load_rubric(model.rubric), request, how_to_reply), schema_of(request, rationale=rationale)]
        case GuardGrader():
            return FORMS[model.format].body(request)
        case _:
            raise TypeError(f"nobody knows what a {model.kind} is shown")


def _output_tokens(judge: RemoteModel) -> tuple[int, int]:
    """Likely and at most."""
    likely = VERDICT_TOKENS + (LIKELY_RATIONALE_TOKENS if isinstance(judge, RemoteJudge) and judge.rationale else 0)
    return min(likely, judge.max_output_tokens), judge.max_output_tokens


def as_json(rows: Sequence[Row], budget: BudgetConfig) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in rows],
        "calls": sum(row.calls for row in rows),
        "calls_at_most": sum(row.calls_at_most for row in rows),
        "usd": sum(row.usd for row in rows),
        "usd_at_most": sum(row.usd_at_most for row in rows),
        "caps": budget.model_dump(exclude={"prices"}),
        "prices_as_of": budget.price_list().as_of.isoformat(),
    }
