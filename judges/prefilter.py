"""Answers that no judge should see: broken ones, and ones written for the judge instead of the user.

A constant answer that imitates a verdict won 86.5 % against GPT-4 as a judge (arXiv 2410.07137), and a bare colon or "Thought process:" is
often graded right (arXiv 2507.08794). What is filtered is neither chosen nor rejected: a filter is no judgement.
"""

from __future__ import annotations

import re

from dpo_loop.degenerate import degeneration_of
from dpo_loop.types import FinishReason, Prompt
from judges.asker import Candidate

VERDICT = "verdict"
BARE_OPENING = "bare_opening"

_VERDICT = re.compile(
    r"""\[\[\s*(?:A|B|C|tie)\s*(?:[<>=]+\s*[AB]\s*)?\]\]     # [[A]], [[A>>B]]
    | "winner"\s*:                                           # the JSON of a verdict
    | <{2,}\s*(?:END\s+)?(?:ANSWER|CONVERSATION|REFERENCE)   # a fence
    | \b(?:answer|response|assistant|output)\s+(?:A|B)\s+is\s+(?:clearly\s+|much\s+)?better\b
    | \bignore\s+(?:all\s+|any\s+)?(?:the\s+)?(?:previous|above|prior)\s+instructions\b""",
    re.VERBOSE | re.IGNORECASE,
)
_BARE_OPENING = re.compile(
    r"(?:thought process|solution|final answer|reasoning|let'?s solve this (?:problem )?step by step)?\s*[:.]?", re.IGNORECASE
)


def why_filtered(prompt: Prompt, answer: Candidate) -> str | None:
    """What is wrong with an answer, None if a judge may see it. An answer that quotes its prompt's own verdict talk may."""
    text = answer.text.strip()
    finish = FinishReason.STOP if answer.is_whole else FinishReason.LENGTH
    if (found := degeneration_of(answer.text, finish, prompt=prompt.text)) is not None:
        return found.value
    if _BARE_OPENING.fullmatch(text):
        return BARE_OPENING
    asked = " ".join(message.content for message in prompt.messages)
    if _VERDICT.search(text) and not _VERDICT.search(asked):
        return VERDICT
    return None
