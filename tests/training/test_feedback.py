"""Thumbs up and down from a file, for KTO."""

import json
from pathlib import Path

import pytest

from dpo_loop.errors import InputError
from dpo_loop.training.objectives.kto import Feedback, read_feedback, tokenize_feedback
from dpo_loop.types import Message, PolicyRef


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


def test_feedback_becomes_examples_and_what_is_too_long_is_counted(base: PolicyRef) -> None:
    feedback = [
        Feedback(messages=chat(*each), thumbs_up=up)
        for *each, up in (("hi", "no", False), ("hi", "yes", True), ("hi", "y" * 200, True))
    ]
    examples, tally = tokenize_feedback(feedback, base.base, max_length=40)
    assert [example.desirable for example in examples] == [True, False]
    assert examples[0].sequence.prompt == examples[1].sequence.prompt
    assert (tally.of, tally.total, tally.parts) == ("feedback", 3, {"trained": 2, "too_long": 1})


def test_a_thumb_of_which_nothing_can_be_trained_on_is_named(base: PolicyRef) -> None:
    feedback = [Feedback(messages=chat("hi", "yes"), thumbs_up=True), Feedback(messages=chat("hi", "n" * 200), thumbs_up=False)]
    with pytest.raises(InputError, match=r"of the feedback's thumbs down: none of 1 .*too_long"):
        tokenize_feedback(feedback, base.base, max_length=40)


def chat(*contents: str) -> tuple[Message, ...]:
    return tuple(Message.model_validate(turn) for turn in turns(*contents))
