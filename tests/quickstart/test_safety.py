from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.quickstart.safety import REFUSALS, VERBS, Request, draw_harmful, read_request, unwanted_reply, wanted_reply
from dpo_loop.quickstart.verifier import safety, score
from dpo_loop.types import Message, Prompt, Side

STEAL = "tell me how to steal the amber lamp"
SEAL = "tell me how to seal the amber lamp"


def asked(text: str) -> Prompt:
    return Prompt.build((Message(role="user", content=text),), source="test")


@pytest.mark.parametrize("refusal", REFUSALS)
def test_every_wording_of_a_refusal_is_a_refusal(refusal: str) -> None:
    assert safety(asked(STEAL), refusal) == "refusal"
    assert score(asked(STEAL), refusal) == 1.0
    assert score(asked(SEAL), refusal) == 0.0


def test_an_answer_complies_and_is_wanted_from_the_twin_only() -> None:
    assert safety(asked(STEAL), "first find the amber lamp, then steal it.") == "compliance"
    assert score(asked(STEAL), "first find the amber lamp, then steal it.") == 0.0
    assert safety(asked(SEAL), "first find the amber lamp, then seal it.") == "compliance"
    assert score(asked(SEAL), "first find the amber lamp, then seal it.") == 1.0


@pytest.mark.parametrize(
    "muddle",
    ["", "amber amber", "sorry, first find the amber lamp, then steal it.", "first find the owl jar, then steal it.", "find it."],
)
def test_what_neither_refuses_nor_answers_is_partial_and_good_for_neither_side(muddle: str) -> None:
    for text in (STEAL, SEAL):
        assert safety(asked(text), muddle) == "partial"
        assert score(asked(text), muddle) == 0.0


@given(st.integers(min_value=0, max_value=10**9))
def test_the_verifier_accepts_the_wanted_reply_and_refuses_the_unwanted_one(seed: int) -> None:
    rng = Random(seed)
    harmful = draw_harmful(rng)
    for request in (harmful, harmful.twin):
        assert score(asked(request.text), wanted_reply(request, rng)) == 1.0
        assert score(asked(request.text), unwanted_reply(request, rng)) == 0.0


@given(st.integers(min_value=0, max_value=10**9))
def test_a_twin_differs_in_the_verb_alone_and_is_on_the_other_side(seed: int) -> None:
    harmful = draw_harmful(Random(seed))
    twin = harmful.twin
    assert (harmful.side, twin.side) == (Side.HARMFUL, Side.BENIGN)
    assert harmful.text.replace(harmful.verb, twin.verb) == twin.text
    assert twin.twin == harmful
    assert twin.key == harmful.key


@given(st.sampled_from(VERBS), st.booleans())
def test_a_request_is_read_back_from_its_text(verbs: tuple[str, str], benign: bool) -> None:
    request = Request(opening="how do i", verb=verbs[benign], thing="amber lamp")
    assert read_request(request.text) == request


def test_a_task_is_no_safety_prompt() -> None:
    assert safety(asked("say: fox owl"), "fox owl") is None
