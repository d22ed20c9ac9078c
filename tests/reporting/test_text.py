from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.reporting.text import duration, figure, interval, json_for_script, percent, points, visible


@given(st.text())
def test_nothing_invisible_is_left_in_shown_text(text: str) -> None:
    shown = visible(text)
    assert not [
        char for char in shown if unicodedata.bidirectional(char) in {"LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI"}
    ]
    assert not [char for char in shown if unicodedata.category(char) in {"Cc", "Cf", "Cs", "Co", "Cn"} and char not in "\n\t"]
    assert visible(shown) == shown


def test_what_text_hides_is_named() -> None:
    assert visible("a\x00b\u202ec\u200bd") == "a␀b⟨U+202E⟩c⟨U+200B⟩d"
    for hidden in "\xad\u034f\u115f\u1160\u17b4\u180e\u2800\u3164\ufe00\uffa0\ue000\U000e0041\U000e0100\U0010ffff\u0378":
        assert visible(f"a{hidden}b") == f"a⟨U+{ord(hidden):04X}⟩b"
    assert visible("❤\ufe0f 👨\u200d👩 a\ufe0f ❤\ufe0f\ufe0f") == "❤\ufe0f 👨⟨U+200D⟩👩 a⟨U+FE0F⟩ ❤\ufe0f⟨U+FE0F⟩"
    assert visible("one\r\ntwo\tthree – 你好 😀") == "one\ntwo\tthree – 你好 😀"


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_json_in_a_script_reads_back_and_cannot_leave_its_element(value: object) -> None:
    written = json_for_script(value)
    assert json.loads(written) == value
    assert not set(written) & {"<", ">", "&", "\u2028", "\u2029"}


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (percent(None), "–"),
        (percent(0.125), "12.5 %"),
        (interval((0.467, 0.4944)), "46.7 to 49.4 %"),
        (points(-0.0001), "0.0"),
        (points(-0.035), "−3.5"),
        (points(0.2), "+20.0"),
        (duration(0.04), "< 0.1 s"),
        (duration(0.44), "0.4 s"),
        (duration(131), "2 min 11 s"),
        (duration(7_300), "2 h 01 min"),
        (figure(12_345), "12\u202f345"),
        (figure(0.123456), "0.1235"),
        (figure(True), "yes"),
        (figure(None), "–"),
    ],
)
def test_figures_read_well(shown: str, wanted: str) -> None:
    assert shown == wanted
