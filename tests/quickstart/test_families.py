from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.quickstart.families import FAMILIES, draw_task, read_task, wrong_answer
from dpo_loop.quickstart.verifier import score, task
from dpo_loop.types import Message, Prompt

seeds = st.integers(min_value=0, max_value=10**9)


def asked(text: str) -> Prompt:
    return Prompt.build((Message(role="user", content=text),), source="test")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("say: fox owl", "fox owl"),
        ("sort: pond bird moon", "bird moon pond"),
        ("say backwards: fox owl jar", "jar owl fox"),
        ("shout: fox owl", "FOX OWL"),
        ("first word: fox owl jar", "fox"),
        ("which is last: fox owl jar", "jar"),
        ("count: fox owl jar oak", "4"),
        ("repeat 3 times: fox owl", "fox owl fox owl fox owl"),
        ("say it 2 times: fox owl", "fox owl fox owl"),
        ("largest number: 17 90 34", "90"),
        ("join with dashes: fox owl", "fox-owl"),
    ],
)
def test_each_family_means_what_its_instruction_says(text: str, right: str) -> None:
    assert task(asked(text), right) == 1.0
    assert task(asked(text), f" {right}\n") == 1.0
    assert task(asked(text), right + " x") == 0.0
    assert task(asked(text), "") == 0.0


@given(seeds)
def test_the_verifier_accepts_the_right_answer_and_refuses_the_wrong_one(seed: int) -> None:
    rng = Random(seed)
    drawn = draw_task(rng)
    assert score(asked(drawn.text), drawn.right) == 1.0
    assert score(asked(drawn.text), wrong_answer(drawn, rng)) == 0.0


@given(seeds)
def test_a_prompts_text_alone_says_what_is_asked(seed: int) -> None:
    drawn = draw_task(Random(seed))
    assert read_task(drawn.text) == drawn


@given(st.text())
def test_any_answer_to_a_task_is_right_or_wrong(answer: str) -> None:
    assert task(asked("say: fox owl"), answer) in (0.0, 1.0)


def test_an_instruction_belongs_to_one_family() -> None:
    instructions = [instruction for family in FAMILIES for instruction in family.instructions]
    assert len(instructions) == len(set(instructions))


def test_what_is_no_task_cannot_be_graded_and_says_so() -> None:
    assert task(asked("why is the sky blue?"), "because") is None
    assert task(asked("say: "), "") is None
    with pytest.raises(ValueError, match="not of the tiny world"):
        score(asked("why is the sky blue?"), "because")
