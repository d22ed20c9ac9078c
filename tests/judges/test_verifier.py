from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path

import pytest

from dpo_loop.errors import InputError
from dpo_loop.types import Decided, Undecided
from judges.backend import JudgeRequest, Reply
from judges.config import VerifierJudge
from judges.verifier import VerifierBackend
from tests.judges.world import make_prompt


def ask(function: str, left: str, right: str) -> Reply:
    backend = VerifierBackend(VerifierJudge(kind="verifier", function=f"tests.judges.world:{function}"))
    return asyncio.run(backend.ask(JudgeRequest(key="k", prompt=make_prompt("say a"), left=left, right=right)))


def test_the_higher_score_wins_and_equal_scores_tie() -> None:
    assert ask("num_a", "aa", "a").outcome == Decided(p_left=1.0)
    assert ask("num_a", "a", "aa").outcome == Decided(p_left=0.0)
    assert ask("num_a", "ab", "ac").outcome == Decided(p_left=0.5)


def test_a_verifier_that_cannot_tell_gives_no_label() -> None:
    assert isinstance(ask("cannot_tell", "a", "b").outcome, Undecided)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("no.such.module:score", "cannot import.*no.such.module.*PYTHONPATH"),
        ("tests.judges.world:no_such_function", "has no such name"),
        ("tests.judges.world:not_a_function", "holds a int"),
    ],
)
def test_a_verifier_that_cannot_be_loaded_is_named(function: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        VerifierBackend(VerifierJudge(kind="verifier", function=function))


@pytest.mark.parametrize(
    ("function", "words"),
    [("returns_nonsense", "returned nan on prompt"), ("returns_a_word", "returned 'good'"), ("raises", "raised ZeroDivisionError")],
)
def test_a_verifier_that_returns_nonsense_or_raises_is_named_with_the_prompt(function: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ask(function, "a", "b")


def test_an_edited_verifier_is_another_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    identities = []
    for number in (1, 2):
        (tmp_path / "edited.py").write_text(f"def score(prompt, text):\n    return {number} / 2\n")
        importlib.invalidate_caches()
        identities.append(VerifierBackend(VerifierJudge(kind="verifier", function="edited:score")).spec.identity)
        monkeypatch.delitem(sys.modules, "edited")
    assert identities[0] != identities[1]
