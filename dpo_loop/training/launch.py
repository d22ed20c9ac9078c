"""Training in several processes: `accelerate launch` on this machine, its lines passed through, its end and its errors brought back.

    stage (this process)  ─►  accelerate launch  ─►  worker 0, worker 1, …   (worker.py)

Whoever of them dies, the rest goes too: accelerate ends the workers when one fails; launcher and workers are told by the kernel when
their parent dies (Linux), so that `kill -9` of the stage leaves nothing on a GPU.

Why a worker ended is in its error file, which has its room on the disk before training starts: a full disk is a reason to end.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import re
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch

from dpo_loop.errors import DpoLoopError, InputError, StageFailedError
from dpo_loop.files import read_json, write_json
from dpo_loop.progress import say
from dpo_loop.training.prerequisites import accelerate_problems, num_processes_of
from dpo_loop.training.run import Job
from dpo_loop.types import StageOutcome

SPEC, OUTCOME = "job.json", "outcome.json"
GRACE_S = 10.0
_TAIL_LINES = 40
_ROOM_BYTES = 64 << 10
"""Of an error file: a long traceback."""
_PR_SET_PDEATHSIG = 1
_ENDED = re.compile(r"rank\s*: (\d+)[^\n]*\n\s*exitcode\s*: -(\d+)")
"""A worker that ended by a signal, in the report that torch's launcher prints."""


def launch(job: Job) -> StageOutcome:
    """`train_adapter` in job.config.num_processes processes, or as job.config.accelerate_config says.

    Raises what a worker raised, where that is an error of ours; InputError for an accelerate config that cannot be used; else
    StageFailedError, with a worker's traceback, or with the last lines if all ended without a word.
    """
    if problems := accelerate_problems(job.config):
        raise InputError("; ".join(problems))
    spec, num = job.keep / SPEC, num_processes_of(job.config)
    for left in (job.keep / OUTCOME, *job.keep.glob(f"{SPEC}.error-*")):
        left.unlink(missing_ok=True)
    write_json(spec, job)
    for index in range(num):
        error_file(spec, index).write_bytes(bytes(_ROOM_BYTES))
    threads = max(1, torch.get_num_threads() // num)
    say(f"train: starting {num} processes with accelerate launch")
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    with subprocess.Popen(
        _command(job, spec, num=num, threads=threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(threads)},
        preexec_fn=end_with(os.getpid()),
    ) as launcher:
        try:
            assert launcher.stdout is not None
            for line in launcher.stdout:
                tail.append(line.rstrip("\n"))
                say(line.rstrip("\n"))
            code = launcher.wait()
        finally:
            _stop(launcher)
    if code != 0:
        raise _worker_error(job, code, list(tail), num=num)
    return read_json(job.keep / OUTCOME, StageOutcome)


def _command(job: Job, spec: Path, *, num: int, threads: int) -> list[str]:
    shape = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--multi_gpu"]  # the CPU too: gloo
    if job.config.accelerate_config is not None:
        shape = ["--config_file", job.config.accelerate_config]
    return [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *shape,
        *("--num_processes", str(num), "--main_process_port", "0", "--num_cpu_threads_per_process", str(threads)),
        *("--module", "dpo_loop.training.worker", str(spec)),
    ]


def end_with(parent: int) -> Callable[[], None]:
    """To be called in a child, before its program starts or first of all in it: the kernel ends it when the parent dies. Linux only."""
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    return prepare


def error_file(spec: Path, index: int) -> Path:
    return spec.with_name(f"{spec.name}.error-{index}")


def leave_word(spec: Path, index: int, error: DpoLoopError) -> None:
    """Why process `index` ends, in the room that its error file has."""
    with error_file(spec, index).open("r+b", buffering=0) as file:  # one write, which no signal tears
        file.write(pickle.dumps(error))


def _words(job: Job) -> list[DpoLoopError]:
    """What the processes said of their ends, the first to end first."""
    files = sorted(job.keep.glob(f"{SPEC}.error-*"), key=lambda path: path.stat().st_mtime_ns)
    return [pickle.loads(content) for content in (path.read_bytes() for path in files) if content.strip(b"\0")]


def _stop(launcher: subprocess.Popen[str]) -> None:
    if launcher.poll() is not None:
        return
    launcher.terminate()  # it ends its workers
    try:
        launcher.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        launcher.kill()
        launcher.wait()


def _worker_error(job: Job, code: int, tail: list[str], *, num: int) -> DpoLoopError:
    """The cause of the end: an error of ours; else what the kernel killed; else another exception of the first worker that had one.

    The others end because of it, with errors of their own: by SIGTERM of the launcher, with exceptions or SIGABRT of a broken connection.
    """
    words = _words(job)
    if ours := [word for word in words if not isinstance(word, StageFailedError)]:
        return ours[0]
    ends = [(f"process {index} of {num}", int(number)) for index, number in _ENDED.findall("\n".join(tail))]
    consequences = {signal.SIGTERM, signal.SIGABRT} if words else {signal.SIGTERM}
    killed = [end for end in ends if end[1] not in consequences]
    if code < 0:
        killed = [(f"the launcher of {num} processes", -code)]
    if killed:
        who, number = killed[0]
        what = f"{who} was killed by signal {number} ({signal.Signals(number).name}); the others were ended. "
        hint = "The kernel kills so where memory runs out. " if number == signal.SIGKILL else ""
        return StageFailedError(
            "train", 128 + number, "\n".join([f"{what}{hint}The same command resumes from the last checkpoint.", *tail])
        )
    return words[0] if words else StageFailedError("train", code, "\n".join(tail))
