"""Pools as a person writes them, and a process of its own that reads them: `datasets` and `huggingface_hub` settle where the hub is when
they are imported.

python -m tests.prompts.read_pools '[{"kind": "external", ...}]'
"""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import TypeAdapter

from dpo_loop.config import Pool
from dpo_loop.errors import DpoLoopError
from dpo_loop.prompts.external import KNOWN
from dpo_loop.prompts.pool import read_pool

RESULT = "result: "
A, B = "a" * 40, "b" * 40
COLUMNS = {"side": {"field": "label", "values": {"safe": "benign", "unsafe": "harmful"}}}
CUSTOM = {
    "kind": "external",
    "set": "custom",
    "licence_ack": "CC0-1.0",
    "source": "org/own",
    "revision": A,
    "split": "test",
    "columns": COLUMNS,
}


def known(name: str, **changes: Any) -> dict[str, Any]:
    """As a person would write it who has read its licence."""
    wanted = KNOWN[name]
    pin = {} if wanted.revision else {"revision": A}
    return {"kind": "external", "set": name, "licence_ack": wanted.licence, **pin, **changes}


def read(pool: Any) -> dict[str, Any]:
    try:
        contents = read_pool(TypeAdapter(Pool).validate_python(pool), None, skip_bad=False)
    except DpoLoopError as error:
        return {"error": str(error), "type": type(error).__name__}
    return {
        "prompts": [[prompt.text, prompt.tags] for prompt in contents.prompts],
        "source": contents.source,
        "revision": contents.revision,
        "licence": contents.licence,
        "skipped": contents.skipped,
        "bad": contents.bad_counts,
    }


if __name__ == "__main__":
    for pool in json.loads(sys.argv[1]):
        print(RESULT + json.dumps(read(pool)))
