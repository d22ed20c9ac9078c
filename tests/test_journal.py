"""A journal keeps every row it acknowledged, whatever a crash does to its last line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.journal import Journal

rows = st.lists(st.dictionaries(st.text(max_size=4), st.text(max_size=8) | st.integers(), max_size=3), max_size=6)


@given(written=rows, later=rows, cut=st.integers(0, 10_000))
def test_a_torn_last_line_is_cut_off_and_the_rest_survives(
    tmp_path_factory: pytest.TempPathFactory, written: list[dict[str, object]], later: list[dict[str, object]], cut: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "items.jsonl"
    with Journal(path) as journal:
        for row in written:
            journal.append([row])
    content = path.read_bytes()
    path.write_bytes(content[: cut % (len(content) + 1)])
    whole = content[: cut % (len(content) + 1)].count(b"\n")
    with Journal(path) as journal:
        assert journal.rows == written[:whole]
        journal.append(later)
    with Journal(path) as journal:
        assert journal.rows == written[:whole] + later


def test_damage_before_the_last_line_is_not_repaired_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": oops}\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"items\.jsonl:2 is damaged"):
        Journal(path)
    assert path.read_bytes().count(b"\n") == 3


def test_rows_are_one_json_object_a_line(tmp_path: Path) -> None:
    with Journal(tmp_path / "items.jsonl") as journal:
        journal.append([{"text": "two\nlines \u2028 and é"}, {"n": 1}])
    lines = (tmp_path / "items.jsonl").read_text().split("\n")
    assert json.loads(lines[0])["text"] == "two\nlines \u2028 and é"
    assert json.loads(lines[1]) == {"n": 1}
