from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.config import HubPool, JsonlPool
from dpo_loop.errors import InputError, PromptFileError
from dpo_loop.prompts.pool import PoolContents, normalised, read_pool
from dpo_loop.types import Message, Prompt

POOL = JsonlPool(kind="jsonl", path="pool.jsonl")
GOOD = b'{"prompt": "why is the sky blue?"}'


def read(file: Path, *lines: bytes, skip_bad: bool = False) -> PoolContents:
    file.write_bytes(b"\n".join(lines))
    return read_pool(POOL, file, skip_bad=skip_bad)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"prompt": "why', "not json", "Unterminated string"),
        (b"why is the sky blue?", "not json", "Expecting value"),
        (b'{"prompt": ""}', "empty prompt", "a turn without text"),
        (b'{"prompt": " \\n "}', "empty prompt", "a turn without text"),
        (b'{"messages": []}', "not a conversation", "ends with a user turn"),
        (GOOD, "duplicate", "the same prompt as line 1"),
        (b'{"prompt": "Why is  the sky BLUE?"}', "duplicate", "the same prompt as line 1"),
        (b'{"messages": [{"role": "user", "content": "why is the sky blue?"}]}', "duplicate", "the same prompt as line 1"),
        (b'{"prompt": "caf\xe9"}', "not utf8", "byte 16 of the line"),
        (b'{"prompt": "\\ud800"}', "not utf8", "half of a character"),
        (b'["why"]', "not a conversation", "wanted"),
        (b'{"question": "why"}', "not a conversation", "wanted"),
        (b'{"prompt": "a", "messages": []}', "not a conversation", "one of the two"),
        (b'{"prompt": 7}', "not a conversation", "ends with a user turn"),
        (b'{"messages": [{"role": "user"}]}', "not a conversation", "content: Field required"),
        (b'{"messages": [{"role": "robot", "content": "hi"}]}', "not a conversation", "role"),
        (b'{"messages": ["hi"]}', "not a conversation", "Message"),
        (b'{"messages": [{"role": "assistant", "content": "hi"}]}', "not a conversation", "ends with a user turn"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "user", "content": "c"}]}',
            "not a conversation",
            "a system turn can only come first",
        ),
        (b'{"prompt": "x", "tags": {"side": "evil"}}', "bad tags", "side 'evil' is none of task, harmful, benign"),
        (b'{"prompt": "x", "tags": {"n": 1}}', "bad tags", "must map names to text"),
        (b'{"prompt": "x", "tags": ["n"]}', "bad tags", "must map names to text"),
    ],
)
def test_a_bad_line_is_named_with_its_number_and_reason_or_skipped_and_counted(
    tmp_path: Path, line: bytes, reason: str, detail: str
) -> None:
    file = tmp_path / "pool.jsonl"
    with pytest.raises(PromptFileError) as caught:
        read(file, GOOD, line, b'{"prompt": "and the sea?"}')
    message = str(caught.value)
    assert f"{file}: 1 of 3 prompts cannot be used" in message
    assert f"line 2: {reason}: " in message
    assert detail in message
    assert "--skip-bad-prompts" in message

    contents = read(file, GOOD, line, b'{"prompt": "and the sea?"}', skip_bad=True)
    assert [prompt.text for prompt in contents.prompts] == ["why is the sky blue?", "and the sea?"]
    assert contents.bad_counts == {f"bad_{reason.replace(' ', '_')}": 1}
    assert contents.num_lines == 3


def test_all_bad_lines_are_listed_together_the_first_twenty_by_name(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError) as caught:
        read(tmp_path / "pool.jsonl", GOOD, *[b"{"] * 25)
    message = str(caught.value)
    assert "25 of 26 prompts" in message
    assert "line 21: not json" in message
    assert "line 22" not in message
    assert "… and 5 more" in message


@pytest.mark.parametrize(
    ("lines", "why"), [((), "it is empty"), ((b"", b" "), "it is empty"), ((b"{", b"["), "all 2 lines are bad")]
)
def test_a_file_without_a_usable_prompt_is_refused_even_when_bad_lines_are_skipped(
    tmp_path: Path, lines: tuple[bytes, ...], why: str
) -> None:
    with pytest.raises(PromptFileError, match=why):
        read(tmp_path / "pool.jsonl", *lines, skip_bad=True)


def test_a_missing_file_is_named_with_an_example_of_what_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(PromptFileError, match=r'nowhere\.jsonl cannot be read.*\{"prompt": "Why is the sky blue\?"\}'):
        read_pool(POOL, tmp_path / "nowhere.jsonl", skip_bad=True)
    with pytest.raises(PromptFileError, match="cannot be read"):
        read_pool(POOL, tmp_path, skip_bad=True)


def test_windows_files_blank_lines_and_further_columns_are_fine(tmp_path: Path) -> None:
    contents = read(
        tmp_path / "pool.jsonl", b"\xef\xbb\xbf" + GOOD + b"\r", b"\r", b'{"prompt": "b", "chosen": "c", "tags": null}\r', b""
    )
    assert [prompt.text for prompt in contents.prompts] == ["why is the sky blue?", "b"]


def test_a_conversation_keeps_its_turns_and_tags(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "how are you?"},
    ]
    row = json.dumps({"messages": turns, "tags": {"side": "benign", "category": "chat"}}).encode()
    (prompt,) = read(tmp_path / "pool.jsonl", row).prompts
    assert prompt == Prompt.build(
        tuple(Message.model_validate(turn) for turn in turns), source="pool.jsonl", tags={"side": "benign", "category": "chat"}
    )


@given(
    lines=st.lists(
        st.one_of(st.binary(max_size=30), st.text(max_size=20).map(lambda t: json.dumps({"prompt": t}).encode())), max_size=8
    )
)
def test_every_line_is_a_prompt_or_is_bad_whatever_is_in_the_file(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    file = tmp_path_factory.mktemp("pool") / "pool.jsonl"
    contents = read(file, GOOD, *lines, skip_bad=True)
    num_lines = sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
    assert contents.num_lines == num_lines
    assert len({normalised(prompt) for prompt in contents.prompts}) == len(contents.prompts)
    for prompt in contents.prompts:
        prompt.model_dump_json().encode()


# ---------------------------------------------------------------------------------------------------------- data sets


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a data set in it; the library's cache goes there too, not into the home directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [
        {"question": "why?", "tags": {"side": "benign"}},
        {"question": "", "tags": {"side": "benign"}},
        {"question": "how?", "tags": None},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_data_set_is_read_by_column_with_the_same_checks(hub: Path) -> None:
    pool = HubPool(kind="datasets", path="json", data_files=str(hub / "rows.jsonl"), column="question")
    with pytest.raises(PromptFileError, match="line 2: empty prompt"):
        read_pool(pool, None, skip_bad=False)
    contents = read_pool(pool, None, skip_bad=True)
    assert [(prompt.text, prompt.tags, prompt.source) for prompt in contents.prompts] == [
        ("why?", {"side": "benign"}, "json/train"),
        ("how?", {}, "json/train"),
    ]


def test_a_wrong_column_and_a_missing_data_set_are_named(hub: Path) -> None:
    pool = HubPool(kind="datasets", path="json", data_files=str(hub / "rows.jsonl"), column="prompt")
    with pytest.raises(InputError, match="no column 'prompt'; it has question, tags"):
        read_pool(pool, None, skip_bad=False)
    with pytest.raises(InputError, match="cannot be loaded"):
        read_pool(HubPool(kind="datasets", path=str(hub / "nowhere")), None, skip_bad=False)
