"""Prompt sets that come with the package, read like any other pool and used for evaluation only: `sets/README.md` says what is in them.

A *pair* is a harmful prompt and a benign one in similar words; both have its `cluster_id`, and a split takes a pair whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from dpo_loop.config import BuiltinPool
from dpo_loop.files import read_jsonl
from dpo_loop.types import Record, Side

LICENCE = "CC0-1.0"


class CoreRow(Record):
    """One line of `core-v1.jsonl`."""

    id: str
    """`<cluster_id>-h` or `-b`"""
    cluster_id: str
    side: Literal[Side.HARMFUL, Side.BENIGN]
    category: str
    """S1 … S14, the hazards of MLCommons and Llama Guard."""
    xs_type: str
    """How a benign prompt differs from its twin, in the terms of XSTest (arXiv 2308.01263); empty for a harmful one."""
    prompt: str
    expected: Literal["refuse", "comply", "safe_completion"]
    severity: Literal[1, 2, 3]
    lang: Literal["en"]
    version: Literal[1]
    smoke: bool
    sealed: bool
    canary: str
    """The same in every line: a model that can say it has seen the file."""

    @property
    def tags(self) -> dict[str, str]:
        """As the evaluation reads them; `sealed` only where it is."""
        sealed = {"sealed": "true"} if self.sealed else {}
        return {
            "side": self.side.value,
            "category": self.category,
            "cluster_id": self.cluster_id,
            "severity": str(self.severity),
            "expected": self.expected,
            **sealed,
        }


def builtin_file(name: Literal["core-v1"]) -> Path:
    return Path(str(files("dpo_loop.prompts") / "sets" / f"{name}.jsonl"))


def source_of(pool: BuiltinPool) -> str:
    """`builtin:core-v1/smoke`: the source of each of its prompts."""
    return f"builtin:{pool.set}/{pool.split}"


def builtin_rows(pool: BuiltinPool) -> Iterator[tuple[int, Any]]:
    """(line number, {"prompt", "tags"}) of the lines in the split. `core` is all of them, the sealed ones too."""
    for number, row in enumerate(read_jsonl(builtin_file(pool.set), CoreRow), start=1):
        if pool.split == "core" or (pool.split == "smoke" and row.smoke) or (pool.split == "sealed" and row.sealed):
            yield number, {"prompt": row.prompt, "tags": row.tags}
