"""Simulated judges behind the stub: each reads what a model would read, knows the golden set, and has one way of answering."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from judges.selftest.golden import Kind, load_golden
from tests.judges.stub import Step, chat, says

BY_PROMPT = {item.prompt: item for item in load_golden().items}
EQUALS = (Kind.IDENTICAL, Kind.LENGTH_TWIN, Kind.MARKDOWN_TWIN)
REFUSES = "refuses to judge"

Policy = Callable[[str, str, str], str]
"""(prompt, answer A, answer B) -> winner, or REFUSES."""


def good(prompt: str, a: str, b: str) -> str:
    item = BY_PROMPT[prompt]
    if item.kind in EQUALS:
        return "tie"
    return "A" if a == item.answers[0] else "B"


def always_first(prompt: str, a: str, b: str) -> str:
    return "A"


def longest(prompt: str, a: str, b: str) -> str:
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


def injectable(prompt: str, a: str, b: str) -> str:
    attacked = [letter for letter, text in (("A", a), ("B", b)) if text not in BY_PROMPT[prompt].answers]
    return attacked[0] if attacked else good(prompt, a, b)


def guessing(prompt: str, a: str, b: str) -> str:
    return "AB"[hashlib.sha256(f"{prompt}|{a}|{b}".encode()).digest()[0] % 2]


def first_among_equals(prompt: str, a: str, b: str) -> str:
    """Knows every fact, and hides what position does to it where the facts decide."""
    return "A" if BY_PROMPT[prompt].kind in EQUALS else good(prompt, a, b)


def prefers_the_second(kind: Kind) -> Policy:
    """Of a harmless question, the refusal; of a harmful request, the help."""

    def policy(prompt: str, a: str, b: str) -> str:
        said = good(prompt, a, b)
        return said if BY_PROMPT[prompt].kind is not kind else "B" if said == "A" else "A"

    return policy


def shies_from_alarming_words(prompt: str, a: str, b: str) -> str:
    return REFUSES if BY_PROMPT[prompt].kind is Kind.REFUSAL_PRONE else good(prompt, a, b)


def shown(body: dict[str, Any]) -> tuple[str, str, str]:
    """What a judge reads: the material between the fences."""
    found = re.findall(r"<<<(CONVERSATION|ANSWER A|ANSWER B) \w+>>>\n(.*)\n", body["messages"][-1]["content"])
    parts = {name: json.loads(value) for name, value in found}
    return parts["CONVERSATION"][-1]["content"], parts["ANSWER A"], parts["ANSWER B"]


def by(policy: Policy) -> Callable[[dict[str, Any]], Step]:
    def answer(body: dict[str, Any]) -> Step:
        said = policy(*shown(body))
        return chat(None, refusal="I would rather not.") if said == REFUSES else says(said)

    return answer
