"""What reaches the Prefect UI is small and cannot break its page."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.types import GateState
from flows.artifacts import MAX_TEXT, escape, gate_table, round_markdown
from tests.flows.runs import judged_round, played_round, started_run


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    safe = escape(text)
    assert "<" not in safe
    assert "\n" not in safe
    for special in "|`*_[]":
        assert safe.count(special) == safe.count("\\" + special)


def test_long_text_is_cut() -> None:
    assert len(escape("x" * 10_000)) == MAX_TEXT


@pytest.mark.parametrize("state", [GateState.PASS, GateState.FAIL, GateState.INVALID])
def test_a_rounds_page_and_table_say_what_happened(tmp_path: Path, state: GateState) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, state)
    page = round_markdown(run, 1)
    assert page.startswith(f"# small, round 1: {state.value}")
    assert ("**Promoted.**" in page) == (state is GateState.PASS)
    assert f"because it is {state.value}".replace("_", "\\_") in page
    assert gate_table(run, 1)[0]["state"] == state.value
    assert round_markdown(run, 0).startswith("# small, round 0: the start policy, the anchor")


def test_a_waiting_rounds_page_shows_the_commands_to_type(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.NEEDS_REVIEW)
    assert f"dpo-loop approve {tmp_path} 1 --reviewer NAME" in round_markdown(run, 1)
