"""Judge of kind `verifier`: a program that scores one answer to a task. Both answers are scored; higher wins, equal is a tie."""

from __future__ import annotations

import hashlib
import importlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo_loop.errors import InputError
from dpo_loop.types import Decided, Graded, Outcome, Prompt, Undecided, UndecidedReason
from judges.backend import BackendSpec, JudgeRequest, Reply
from judges.config import VerifierJudge

Function = Callable[[Prompt, str], Any]


def load_function(name: str) -> Function:
    """The function that `module:function` names. Raises InputError, saying what the stage's process could not import."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # user code runs at import and may raise anything
        raise InputError(
            f"cannot import the module of verifier {name}: {type(error).__name__}: {error}. Install it into the environment that runs "
            "the stage, or put its directory on PYTHONPATH."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        held = "has no such name" if function is None else f"holds a {type(function).__name__} there"
        raise InputError(f"verifier {name}: module {module_name} ({module.__file__}) {held}; name a function(prompt, text).")
    return function  # type: ignore[no-any-return]


def source_sha256(name: str) -> str:
    """Hash of the file that defines the function's module, so that an edited verifier is not answered from the ledger."""
    source = getattr(sys.modules[name.partition(":")[0]], "__file__", None)
    return hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else ""


def call(name: str, function: Function, prompt: Prompt, text: str) -> Any:
    """function(prompt, text). Raises InputError naming the prompt when the function raises: its author has to mend it."""
    try:
        return function(prompt, text)
    except Exception as error:
        raise InputError(
            f"verifier {name} raised {type(error).__name__}: {error} on prompt {prompt.id} ({prompt.text[:80]!r}) and the answer "
            f"{text[:80]!r}. It must return a value for any text, None where it cannot tell."
        ) from error


def score_of(name: str, function: Function, prompt: Prompt, text: str) -> float | None:
    """Score in 0..1, None where the function cannot tell. Raises InputError when it returns anything else."""
    score = call(name, function, prompt, text)
    if score is None:
        return None
    if not isinstance(score, int | float) or math.isnan(score) or not 0 <= score <= 1:
        raise InputError(
            f"verifier {name} returned {score!r} on prompt {prompt.id} ({prompt.text[:80]!r}); it must return a number from 0 to 1, or None "
            "where it cannot tell."
        )
    return float(score)


class VerifierBackend:
    def __init__(self, config: VerifierJudge) -> None:
        self._name = config.function
        self._function = load_function(config.function)
        self._spec = BackendSpec(
            name=f"verifier:{config.function}",
            identity={"kind": "verifier", "function": config.function, "source_sha256": source_sha256(config.function)},
            concurrency=1,
            is_instant=True,
            family="verifier",
        )
        # An answer meets several others in a knockout, and a verifier may run for seconds: scores of the prompt at hand.
        self._prompt_id = ""
        self._scores: dict[str, float | None] = {}

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def ask(self, request: JudgeRequest) -> Reply:
        started = time.monotonic()
        texts = (request.left,) if request.right is None else (request.left, request.right)
        scores = [self._score(request.prompt, text) for text in texts]
        return Reply(
            cost_usd=0.0,
            outcome=_outcome(scores),
            raw=" ".join(map(str, scores)),
            latency_s=round(time.monotonic() - started, 6),
            served_model=self._name,
        )

    async def aclose(self) -> None:
        self._scores = {}

    def _score(self, prompt: Prompt, text: str) -> float | None:
        if prompt.id != self._prompt_id:
            self._prompt_id, self._scores = prompt.id, {}
        if text not in self._scores:
            self._scores[text] = score_of(self._name, self._function, prompt, text)
        return self._scores[text]


def _outcome(scores: Sequence[float | None]) -> Outcome:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return Undecided(reason=UndecidedReason.MALFORMED, detail="the verifier cannot tell")
    if len(known) == 1:
        return Graded(quality=known[0])
    left, right = known
    return Decided(p_left=1.0 if left > right else 0.0 if left < right else 0.5)
