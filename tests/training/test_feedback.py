"""Thumbs up and down from a file, for KTO."""

import json
from pathlib import Path

import pytest

from dpo_loop.errors import InputError
from dpo_loop.training.objectives.feedback import Feedback, read_feedback, tokenize_feedback
from dpo_loop.training.objectives.kto import Example
from dpo_loop.types import Message, PolicyRef

FILE = Path("f.jsonl")


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in zip(("user", "assistant") * 2, contents, strict=False)]


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_feedback_is_read_and_other_keys_are_ignored(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.jsonl",
        {"messages": turns("hi", "hello"), "thumbs_up": True, "user": 3},
        {"messages": turns("hi", "go", "no", "!"), "thumbs_up": False},
    )
    assert [(len(each.messages), each.thumbs_up) for each in read_feedback(path)] == [(2, True), (4, False)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "f.jsonl:2 is not feedback: Expecting property name"),
        ("[]", "f.jsonl:2 is not feedback: list indices"),
        ('{"thumbs_up": true}', "f.jsonl:2 is not feedback: no 'messages'"),
        (json.dumps({"messages": turns("hi", "hello")}), "f.jsonl:2 is not feedback: no 'thumbs_up'"),
        (json.dumps({"messages": turns("hi", "hello"), "thumbs_up": "yes"}), "thumbs_up: Input should be a valid boolean"),
        (json.dumps({"messages": turns("hi", "hello"), "thumbs_up": 1}), "thumbs_up: Input should be a valid boolean"),
        (json.dumps({"messages": [{"role": "bot", "content": "x"}], "thumbs_up": True}), "messages.0.role: Input should be"),
        (json.dumps({"messages": turns("hi"), "thumbs_up": True}), "f.jsonl:2 does not end with an assistant turn"),
        (json.dumps({"messages": turns("hi", " "), "thumbs_up": True}), "f.jsonl:2 does not end with an assistant turn"),
        (json.dumps({"messages": [], "thumbs_up": True}), "f.jsonl:2 does not end with an assistant turn"),
    ],
)
def test_a_line_that_is_not_feedback_is_named_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"messages": turns("hi", "hello"), "thumbs_up": True}) + f"\n{line}\n")
    with pytest.raises(InputError) as caught:
        read_feedback(path)
    assert reason in str(caught.value)


def test_a_file_without_feedback_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no feedback"):
        read_feedback(write(tmp_path / "f.jsonl"))


def test_blank_lines_at_the_end_are_no_feedback_and_those_between_are_named(tmp_path: Path) -> None:
    line = json.dumps({"messages": turns("hi", "hello"), "thumbs_up": True})
    path = tmp_path / "f.jsonl"
    path.write_text(f"{line}\n{line}\n\n  \n")
    assert len(read_feedback(path)) == 2
    path.write_text(f"{line}\n\n{line}\n")
    with pytest.raises(InputError, match=r"f\.jsonl:2 is not feedback"):
        read_feedback(path)
    path.write_text("\n\n")
    with pytest.raises(InputError, match="holds no feedback"):
        read_feedback(path)


def test_feedback_becomes_examples_in_its_order_and_what_is_too_long_is_said(base: PolicyRef) -> None:
    feedback = [
        Feedback(messages=chat(*each), thumbs_up=up)
        for *each, up in (("hi", "no", False), ("hi", "yes", True), ("hi", "y" * 200, True))
    ]
    no, yes, long = tokenize_feedback(feedback, base.base, max_length=40, where=FILE)
    assert isinstance(no, Example)
    assert isinstance(yes, Example)
    assert (no.desirable, yes.desirable, long) == (False, True, "too_long")
    assert no.sequence.prompt == yes.sequence.prompt


def test_a_thumb_of_which_nothing_can_be_trained_on_is_named(base: PolicyRef) -> None:
    feedback = [Feedback(messages=chat("hi", "yes"), thumbs_up=True), Feedback(messages=chat("hi", "n" * 200), thumbs_up=False)]
    with pytest.raises(InputError, match=r"f\.jsonl: none of its 1 thumbs down can be trained on: .*too_long"):
        tokenize_feedback(feedback, base.base, max_length=40, where=FILE)


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message.model_validate(turn) for turn in turns(*contents))
