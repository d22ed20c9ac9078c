"""The side of dpo-loop: is the library there, start its process, take the rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import dpo_loop
from dpo_loop.config import InspectTask, LmEvalTask, ProducedTask
from dpo_loop.errors import InputError, InvalidRoundError, StageFailedError
from dpo_loop.files import read_jsonl
from dpo_loop.generation.producers.request import Request
from dpo_loop.types import CapabilityRow

_LIBRARIES = {"lm_eval": ("lm_eval", "lm-eval"), "inspect": ("inspect_ai", "inspect-ai")}
"""kind of task → its module, and the name that pip and the extra of dpo-loop have for it."""
_FINDS_ALL = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if importlib.util.find_spec(name) is None))"
_ENVIRONMENT = {
    # A json.py beside the task's files must not stand in for the standard library's.
    "PYTHONSAFEPATH": "1",
    # Their folder is an input of the stage, so that nothing may be written into it.
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
}
TAIL_LINES = 30


def producer_problems(tasks: Iterable[ProducedTask]) -> list[str]:
    """A line for each task whose interpreter cannot play it, with the way out. Starts each interpreter for a moment."""
    problems = []
    for task in tasks:
        module, distribution = _LIBRARIES[task.kind]
        python = task.python or sys.executable
        try:
            done = subprocess.run(
                [python, "-c", _FINDS_ALL, module, "transformers", "peft", "pydantic"], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            problems.append(f"capability.tasks.{task.id}.python: {python} does not run: {error}")
            continue
        if missing := done.stdout.split():
            packages = [distribution if name == module else name for name in missing]
            problems.append(
                f"capability.tasks.{task.id}: {python} has no {', '.join(missing)}; run `{python} -m pip install {' '.join(packages)}` "
                f"(or install dpo-loop[{distribution}]), or name under `python` an interpreter that has it"
            )
    return problems


def run_producer(request: Request, *, log: Path) -> list[CapabilityRow]:
    """The rows of a task. log: takes what the process says. Raises InputError and InvalidRoundError (of which the canary's is one) as the process
    did, and StageFailedError with the end of its log for anything else.
    """
    asked = Path(request.rows).with_suffix(".request.json")
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
    problem = Path(request.problem)
    if done.returncode and problem.is_file():
        raise _error_of(done.returncode)(f"capability task {request.task.id}: {problem.read_text()}")
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise StageFailedError(f"capability (task {request.task.id})", _unsigned(done.returncode), tail)
    return list(read_jsonl(Path(request.rows), CapabilityRow))


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
