"""Capability tasks of other libraries, and interpreters that stand in for one that has such a library."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.config import CapabilityConfig, InspectTask, LmEvalTask, ProducedTask
from dpo_loop.exchange import read_capability
from dpo_loop.generation.capability import CAPABILITY
from dpo_loop.types import CapabilityRow, PolicyRef
from tests.generation.worlds import ENGINE

CHOICES = ["five", "count to five", "upper case words in five"]
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
needs_inspect = pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")


def produce(out: Path, policy: PolicyRef, *tasks: ProducedTask) -> list[CapabilityRow]:
    files = tuple(None if task.path is None else Path(task.path) for task in tasks)
    materialize(CAPABILITY, out, policy=policy, engine=ENGINE, config=CapabilityConfig(tasks=tasks), files=files, seed=3)
    return list(read_capability(out))


def lm_eval(folder: Path | None, *names: str, **fields: object) -> LmEvalTask:
    return LmEvalTask(kind="lm_eval", id="-".join(names), tasks=names, path=None if folder is None else str(folder), **fields)


def inspect(file: Path, task: str, **fields: object) -> InspectTask:
    return InspectTask(kind="inspect", id=task, task=task, path=str(file), **fields)


def stand_in(path: Path, body: str, *, versions: str = "{'lm-eval': '0.4.13', 'torch': '2.13.0'}") -> str:
    """An interpreter that has everything, in these versions, and plays `body` instead of a producer. Both are Python."""
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nif sys.argv[1] == '-c':\n"
        f"    print('hello from a site hook')\n    print(json.dumps(dict(missing=[], versions={versions})))\n    sys.exit()\n"
        f"request = json.load(open(sys.argv[3]))\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


def writes(*rows: dict[str, object]) -> str:
    """A body that hands over these rows of the task that is asked for."""
    return f"open(request['rows'], 'w').write(''.join(json.dumps({{**row, 'task': request['task']['id']}}) + '\\n' for row in {list(rows)!r}))"
