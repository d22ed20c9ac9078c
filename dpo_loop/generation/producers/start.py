"""The side of dpo-loop: is the library there, start its process, take the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dpo_loop
from dpo_loop.config import InspectTask, LmEvalTask, ProducedTask
from dpo_loop.errors import ConfigError, InputError, InvalidRoundError, StageFailedError
from dpo_loop.files import read_jsonl
from dpo_loop.generation.producers.request import Request
from dpo_loop.types import CapabilityRow

_LIBRARIES = {"lm_eval": ("lm_eval", "lm-eval"), "inspect": ("inspect_ai", "inspect-ai")}
"""kind of task → its module, and the name that pip and the extra of dpo-loop have for it."""
_IMPORTED = ("transformers", "peft", "pydantic")
_LOOK = """
import importlib.util, json, sys
from importlib import metadata
asked = json.loads(sys.argv[1])
missing = [name for name in asked["modules"] if importlib.util.find_spec(name) is None]
versions = {}
for name in asked["distributions"]:
    try:
        versions[name] = metadata.version(name)
    except metadata.PackageNotFoundError:  # a library may be on the path without being installed
        continue
print(json.dumps({"missing": missing, "versions": versions}))
"""
"""Imports nothing but the standard library, so that it takes a moment."""
_ENVIRONMENT = {
    # A json.py beside the task's files must not stand in for the standard library's.
    "PYTHONSAFEPATH": "1",
    # Their folder is an input of the stage, so that nothing may be written into it.
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
TAIL_LINES = 30


@dataclass(frozen=True, slots=True)
class Produced:
    rows: list[CapabilityRow]
    canary: dict[str, Any] | None
    """Figures that showed that the process played the policy; None where it has no canary."""


def producer_problems(tasks: Iterable[ProducedTask]) -> list[str]:
    """A line for each task whose interpreter cannot play it, with the way out. Starts each interpreter for a moment."""
    return [seen for seen in map(_look, tasks) if isinstance(seen, str)]


def producer_versions(tasks: Iterable[ProducedTask]) -> dict[str, dict[str, str]]:
    """task id → versions of the packages that its interpreter plays it with. Raises ConfigError with the lines of producer_problems."""
    seen = {task.id: _look(task) for task in tasks}
    if problems := [problem for problem in seen.values() if isinstance(problem, str)]:
        raise ConfigError(problems)
    return {id: versions for id, versions in seen.items() if not isinstance(versions, str)}


def _look(task: ProducedTask) -> dict[str, str] | str:
    """Versions, or the problem."""
    module, distribution = _LIBRARIES[task.kind]
    python = task.python or sys.executable
    asked = {"modules": [module, *_IMPORTED], "distributions": [distribution, "torch", "transformers", "peft"]}
    try:
        done = subprocess.run([python, "-c", _LOOK, json.dumps(asked)], capture_output=True, text=True, check=True)
        seen = json.loads(done.stdout.splitlines()[-1])  # a site hook may say something first
        missing, versions = seen["missing"], seen["versions"]
    except (OSError, subprocess.CalledProcessError, ValueError, LookupError) as error:
        return f"capability.tasks.{task.id}.python: {python} does not run: {error}"
    if missing:
        packages = [distribution if name == module else name for name in missing]
        return (
            f"capability.tasks.{task.id}: {python} has no {', '.join(missing)}; run `{python} -m pip install {' '.join(packages)}` "
            f"(or install dpo-loop[{distribution}]), or name under `python` an interpreter that has it"
        )
    return {str(name): str(version) for name, version in versions.items()}


def run_producer(request: Request, *, log: Path) -> Produced:
    """Play a task. log: takes what the process says. Raises InputError and InvalidRoundError (of which the canary's is one) as the process
    did, and StageFailedError with the end of its log for anything else.
    """
    rows, problem, proof = (Path(file) for file in (request.rows, request.problem, request.proof))
    for left_by_an_earlier_process in (rows, problem, proof):
        left_by_an_earlier_process.unlink(missing_ok=True)
    asked = rows.with_suffix(".request.json")
    asked.write_text(request.model_dump_json())
    module = f"{__package__}.{request.task.kind}"
    package = Path(dpo_loop.__file__).parents[1]
    with log.open("wb") as output:
        done = subprocess.run(
            [request.task.python or sys.executable, "-m", module, str(asked)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=_folder(request.task, request.file),
            env={**os.environ, "PYTHONPATH": _joined(package), **_ENVIRONMENT},
        )
    if done.returncode and problem.is_file():
        raise _error_of(done.returncode)(f"capability task {request.task.id}: {problem.read_text()}")
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise StageFailedError(f"capability (task {request.task.id})", _unsigned(done.returncode), tail)
    return Produced(list(read_jsonl(rows, CapabilityRow)), json.loads(proof.read_text()) if proof.is_file() else None)


def _folder(task: ProducedTask, file: str | None) -> str | None:
    match task:
        case LmEvalTask():
            return file
        case InspectTask():
            return None if file is None else str(Path(file).parent)


def _joined(package: Path) -> str:
    return os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))


def _unsigned(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _error_of(returncode: int) -> type[InputError] | type[InvalidRoundError]:
    return InputError if returncode == InputError.exit_code else InvalidRoundError
