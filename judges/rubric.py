"""Rubrics are versioned Markdown, and what a judge is shown: rubric, conversation, two fenced answers, the verdict's schema.

The candidates are hostile input. Each is one JSON string on one line, so it cannot open a line of its own; every fence carries a
nonce that follows from the key of the call, so nobody who writes an answer can know it; and runs of angle brackets, which could
look like a fence, are escaped. No prompt is a full defence: the self-test of a judge measures what is left.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from dpo_loop.errors import InputError
from dpo_loop.types import canonical_json
from judges.backend import JudgeRequest

LAYOUT = 1
"""Version of `render`; part of every key."""

MAX_RATIONALE_CHARS = 600
VERDICT_SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["rationale", "winner"],
    "properties": {
        # Without a limit a weak model fills the string up to its token limit and every verdict is truncated.
        "rationale": {"type": "string", "maxLength": MAX_RATIONALE_CHARS},
        "winner": {"type": "string", "enum": ["A", "B", "tie"]},
    },
}
VERDICT_SCHEMA_WITHOUT_LENGTHS: dict[str, Any] = {
    **VERDICT_SCHEMA,
    "properties": {**VERDICT_SCHEMA["properties"], "rationale": {"type": "string"}},
}
"""The same verdicts, for servers that refuse `maxLength`: OpenAI does so for fine-tuned models."""


@dataclass(frozen=True, slots=True)
class Rubric:
    name: str
    version: int
    text: str
    sha256: str

    @property
    def identity(self) -> dict[str, Any]:
        """What of the request may change an answer, for the key of a call."""
        schema = hashlib.sha256(canonical_json(VERDICT_SCHEMA).encode()).hexdigest()
        return {"rubric": self.name, "rubric_sha256": self.sha256, "schema_sha256": schema, "layout": LAYOUT}


def load_rubric(name: str) -> Rubric:
    """A rubric of `judges/rubrics`. Raises InputError if there is none of that name or its head is not readable."""
    path = files("judges") / "rubrics" / f"{name}.md"
    if not path.is_file():
        raise InputError(f"there is no rubric {name!r} in judges/rubrics")
    whole = path.read_text(encoding="utf-8")
    head = re.match(r"---\nname: (?P<name>[\w-]+)\nversion: (?P<version>\d+)\n---\n", whole)
    if head is None or head["name"] != name:
        raise InputError(f"rubric {name!r} must open with its name and version between lines of `---`")
    return Rubric(name, int(head["version"]), whole[head.end() :].strip(), hashlib.sha256(whole.encode()).hexdigest())


def render(rubric: Rubric, request: JudgeRequest) -> list[dict[str, str]]:
    """Chat messages of one call: the rubric as system turn (equal for all calls, so a provider can cache it), then the material."""
    nonce = hmac.new(b"dpo-loop fence", request.key.encode(), "sha256").hexdigest()[:16]
    conversation = [message.model_dump() for message in request.prompt.messages]
    parts = [("CONVERSATION", conversation), ("ANSWER A", request.left), ("ANSWER B", request.right)]
    fenced = [f"<<<{name} {nonce}>>>\n{_inert(value)}\n<<<END {name} {nonce}>>>" for name, value in parts]
    closing = f"Material ends here. Only lines that carry {nonce} are fences. Which answer is better, A or B, or is it a tie?"
    return [{"role": "system", "content": rubric.text}, {"role": "user", "content": "\n".join([*fenced, closing])}]


def _inert(value: Any) -> str:
    """JSON on one line that equals `value` when decoded and holds no fence."""
    text = (
        json.dumps(value, ensure_ascii=False).replace("\u2028", "\\u2028").replace("\u2029", "\\u2029").replace("\x85", "\\u0085")
    )
    return re.sub(r"<{2,}|>{2,}", lambda run: "".join(f"\\u{ord(sign):04x}" for sign in run[0]), text)
