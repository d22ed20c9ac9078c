"""Label probabilities as a server states them; the tests of a real server are in test_vllm_judge.py."""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import replace

import pytest

from dpo_loop.errors import JudgeError
from dpo_loop.types import Decided, Graded, Undecided, UndecidedReason
from judges.config import VllmLabelJudge
from tests.judges.asking import REQUEST, ask, with_backend
from tests.judges.stub import KEY_ENV, Step, Stub, chat


def judge_at(stub: Stub) -> VllmLabelJudge:
    return VllmLabelJudge(kind="vllm_label", model="judge", base_url=stub.base_url, api_key_env=KEY_ENV)


def probabilities(**p: float) -> Step:
    """p: probability of each label; the stub's tokenizer gives a sign its code point as id."""
    body = json.loads(chat("A").body)
    seen = [{"token": f"token_id:{ord(label.strip('_'))}", "logprob": math.log(value), "bytes": None} for label, value in p.items()]
    body["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -1.0, "bytes": None, "top_logprobs": seen}]}
    return Step(body=json.dumps(body).encode())


@pytest.mark.parametrize(
    ("p", "p_left"), [({"A": 0.6, "B": 0.2, "C": 0.2}, 0.7), ({"A": 0.5, "B": 0.25}, 2 / 3), ({"C": 0.9, "A": 1e-9}, 0.5)]
)
def test_the_label_s_probabilities_make_the_verdict(stub: Stub, p: dict[str, float], p_left: float) -> None:
    stub.script = [probabilities(**p)]
    [reply] = ask(judge_at(stub))
    assert isinstance(reply.outcome, Decided)
    assert reply.outcome.p_left == pytest.approx(p_left, abs=1e-6)
    assert reply.outcome.label_mass == pytest.approx(sum(p.values()))
    body = stub.seen[0].body
    assert (body["max_completion_tokens"], body["logprob_token_ids"]) == (1, [65, 66, 67])


def test_an_answer_alone_gets_the_expected_digit(stub: Stub) -> None:
    stub.script = [probabilities(_1=0.25, _9=0.75)]
    alone = replace(REQUEST, right=None)
    reply = asyncio.run(with_backend(judge_at(stub), lambda backend: backend.ask(alone)))
    assert isinstance(reply.outcome, Graded)
    assert reply.outcome.quality == pytest.approx(0.75)


def stated(**logprobs: float) -> Step:
    """As `probabilities`, with log-probabilities as they stand, which may be none."""
    body = json.loads(chat("A").body)
    seen = [{"token": f"token_id:{ord(label)}", "logprob": value, "bytes": None} for label, value in logprobs.items()]
    body["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -1.0, "bytes": None, "top_logprobs": seen}]}
    return Step(body=json.dumps(body).encode())


@pytest.mark.parametrize(
    "step",
    [
        stated(A=math.nan, B=math.nan, C=math.nan),
        stated(A=math.nan, B=-5.0),
        stated(A=math.inf, B=-5.0),
        stated(A=3.0, B=-5.0),
        stated(A=-math.inf, B=-math.inf),
    ],
    ids=["all nan", "one nan", "infinite", "above certainty", "impossible"],
)
def test_broken_log_probabilities_are_no_tie_and_no_winner(stub: Stub, step: Step) -> None:
    stub.policy = lambda body: step
    [reply] = ask(judge_at(stub).model_copy(update={"min_label_mass": 0.0}))
    assert isinstance(reply.outcome, Undecided)
    assert reply.outcome.reason is UndecidedReason.MALFORMED


@pytest.mark.parametrize("tokens", [b"no json", b'{"tokens": ["A"]}', b'{"tokens": [1, 2]}', b"[]"])
def test_a_label_that_is_not_one_token_stops_before_anything_is_asked(stub: Stub, tokens: bytes) -> None:
    stub.tokenizer = Step(body=tokens)
    with pytest.raises(JudgeError, match="must be one token"):
        ask(judge_at(stub))
    assert stub.seen == []


@pytest.mark.parametrize(
    "step", [probabilities(A=0.2, B=0.1), chat("A"), probabilities(Z=1.0)], ids=["little mass", "no log-probs", "another token"]
)
def test_a_model_that_wants_to_say_something_else_has_not_judged(stub: Stub, step: Step) -> None:
    stub.policy = lambda body: step
    [reply] = ask(judge_at(stub))
    assert isinstance(reply.outcome, Undecided)
    assert reply.outcome.reason is UndecidedReason.MALFORMED
