"""A stage as a child process: its log streamed, and nothing of it left behind by a cancel, a kill or a crash.

    dpo-loop or Prefect worker  ─►  supervisor (this file as a program)  ─►  stage (leader)  ─►  engines, ranks

The supervisor is told by the kernel when its parent dies (PR_SET_PDEATHSIG), so it outlives no flow, and adopts whatever the stage
leaves behind (PR_SET_CHILD_SUBREAPER), so nothing outlives it. It has its own session: `kill -9` of the parent's whole process group
leaves it alive to clean up. On a stop only the leader is signalled, because a leader ends its own ranks and may save first; after
the grace everything is killed. Output goes to a file, never a pipe: a stage that prints while it saves must not die of EPIPE when
the flow is gone. Facts and measurements: shared/facts/prefect.md §3-4. Standard library only.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOPPED = 143
GRACE_S = 20.0
"""Grace and sweep (5 s) must end before a Prefect worker's SIGKILL at 30 s."""
SWEEP_S = 5.0


# -------------------------------------------------------------------------------------------------------- in the parent


class StageTimeoutError(Exception):
    pass


def run_supervised(
    argv: Sequence[str],
    *,
    log_file: Path,
    on_line: Callable[[str], None],
    env: Mapping[str, str] | None = None,
    grace_s: float = GRACE_S,
    timeout_s: float | None = None,
    tail_lines: int = 30,
    poll_s: float = 0.2,
) -> tuple[int, str]:
    """Run a command under the supervisor; returns (exit code, last lines of its log).

    on_line gets every line as it appears. A command killed by signal n gives 128 + n; one stopped by us gives 143. The log is appended to,
    so a retried stage keeps the earlier attempt. Raises StageTimeoutError after timeout_s. However this function is left (KeyboardInterrupt,
    a cancelled Prefect run, the time-out), the command and all it started are gone when it returns.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    log_file.touch()
    tail: deque[str] = deque(maxlen=tail_lines)
    end = None if timeout_s is None else time.monotonic() + timeout_s
    with log_file.open("rb") as log:
        log.seek(0, os.SEEK_END)
        lines = _LineReader()
        process = start_supervised(argv, log_file=log_file, env=env, grace_s=grace_s)
        try:
            while True:
                done = process.poll() is not None  # before the read: one more read after the exit
                for line in lines.feed(log.read(), last=done):
                    tail.append(line)
                    on_line(line)
                if done:
                    break
                if end is not None and time.monotonic() > end:
                    raise StageTimeoutError(f"not done after {timeout_s:g} s")
                time.sleep(poll_s)
        finally:
            stop_supervised(process, grace_s=grace_s)
    return process.returncode, "\n".join(tail)


def start_supervised(
    argv: Sequence[str], *, log_file: Path, env: Mapping[str, str] | None = None, grace_s: float = GRACE_S
) -> subprocess.Popen[bytes]:
    """Start a command under a supervisor that ends with this thread. What the supervisor itself has to say goes to the log as well."""
    command = [
        sys.executable,
        "-m",
        "flows.supervise",
        "--grace",
        str(grace_s),
        "--parent",
        str(os.getpid()),
        "--log",
        str(log_file),
    ]
    with log_file.open("ab") as errors:
        return subprocess.Popen(
            [*command, "--", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            start_new_session=True,
            env={**os.environ, **(env or {}), "PYTHONUNBUFFERED": "1"},
        )


def stop_supervised(process: subprocess.Popen[bytes], *, grace_s: float = GRACE_S) -> None:
    """Stop it if it runs; returns when everything below it is gone."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(grace_s + SWEEP_S + 5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class _LineReader:
    """Bytes in as they come, whole lines out. A character split between two reads stays whole; `\\r` of progress bars ends a line."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""

    def feed(self, data: bytes, *, last: bool) -> Iterator[str]:
        *lines, self._rest = (self._rest + self._decoder.decode(data, last)).replace("\r", "\n").split("\n")
        if last and self._rest:
            lines.append(self._rest)
        yield from (line for line in lines if line.strip())


def die_with_parent() -> None:
    """SIGTERM to this process when its parent dies. For a stage: the case that even its supervisor was killed with -9."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


# ----------------------------------------------------------------------------------------------------- the supervisor


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.supervise")
    parser.add_argument("--grace", type=float, default=GRACE_S)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--log", type=Path)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command

    stops: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda received, _frame: stops.append(received))
    if sys.platform == "linux":
        die_with_parent()
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if args.parent and os.getppid() != args.parent:  # it died before the prctl
        return STOPPED

    with args.log.open("ab", buffering=0) if args.log else contextlib.nullcontext() as log:
        leader = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stdout=log,
            stderr=None if log is None else subprocess.STDOUT,
        )
        deadline = None
        while leader.poll() is None:
            if stops and deadline is None:
                deadline = time.monotonic() + args.grace
                _signal([leader.pid], signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                break
            time.sleep(0.05)
        _sweep(leader)
    code = leader.poll()
    if stops:
        return STOPPED
    return 137 if code is None else code if code >= 0 else 128 - code


def _sweep(leader: subprocess.Popen[bytes]) -> None:
    """End everything below us, whatever its process group or session; daemons left by a leader that ended well too."""
    if leader.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGTERM)  # enough where there is no /proc to see more by
    if left := _descendants():
        _signal(left, signal.SIGTERM)
        time.sleep(0.2)
    end = time.monotonic() + SWEEP_S
    while (left := _descendants()) and time.monotonic() < end:
        _signal(left, signal.SIGKILL)
        time.sleep(0.05)
        leader.poll()  # reap the leader through Popen first, so that its exit code is kept
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _descendants() -> list[int]:
    """Living processes below this one, from /proc; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    try:
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    except FileNotFoundError:
        return []
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat") as file:
                state, parent = file.read().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            children.setdefault(int(parent), []).append(pid)
    found: list[int] = []
    todo = [os.getpid()]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    sys.exit(main())
