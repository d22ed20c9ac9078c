"""Nothing that a stage started outlives a cancel or a kill of what started it; its log and its exit code arrive."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flows.supervise import StageTimeoutError, run_supervised, start_supervised, stop_supervised

LEADER = """
import os, signal, subprocess, sys, time
from pathlib import Path
here, manner = Path(sys.argv[1]), sys.argv[2]
rank = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(120)" if manner == "ignore" else "import time; time.sleep(120)"
ranks = [subprocess.Popen([sys.executable, "-c", rank], start_new_session=True) for _ in range(2)]
def save(number, frame):
    print("saving " * 20_000, flush=True)
    (here / "saved").write_text("yes")
    sys.exit(0)
if manner == "ignore": signal.signal(signal.SIGTERM, signal.SIG_IGN)
if manner == "save": signal.signal(signal.SIGTERM, save)
(here / "pids.tmp").write_text(" ".join(str(p) for p in (os.getpid(), *(r.pid for r in ranks))))
(here / "pids.tmp").rename(here / "pids")
print("ready", flush=True)
time.sleep(120)
"""

PARENT = """
import sys
from pathlib import Path
from flows.supervise import run_supervised
run_supervised(sys.argv[2:], log_file=Path(sys.argv[1]), on_line=print, grace_s=1.0)
"""


@pytest.fixture
def leader(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command of a stage with two ranks in sessions of their own, as torch elastic starts them."""
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    return lambda manner: [sys.executable, str(script), str(tmp_path), manner]


@pytest.fixture
def parent(tmp_path: Path, leader: Callable[[str], list[str]]) -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    """A process of its own process group, as a flow is, that runs the stage under the supervisor."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    started: list[subprocess.Popen[bytes]] = []

    def start(manner: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(script), str(tmp_path / "stage.log"), *leader(manner)]
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True, env=env))
        wait_for((tmp_path / "pids").exists)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def none_left(tmp_path: Path) -> bool:
    return not any(alive(int(pid)) for pid in (tmp_path / "pids").read_text().split())


def run_python(code: str, tmp_path: Path, lines: list[str] | None = None, **options: float) -> tuple[int, str]:
    told = [] if lines is None else lines
    return run_supervised(
        [sys.executable, "-c", textwrap.dedent(code)], log_file=tmp_path / "a.log", on_line=told.append, **options
    )


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("manner", ["normal", "ignore", "save"])
def test_nothing_survives_the_end_of_the_parent(
    parent: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path, manner: str, how: signal.Signals
) -> None:
    process = parent(manner)
    process.send_signal(how)
    process.wait()
    wait_for(lambda: none_left(tmp_path))
    assert (tmp_path / "saved").exists() == (manner == "save")


def test_nothing_survives_kill_9_of_the_parents_whole_process_group(
    parent: Callable[[str], subprocess.Popen[bytes]], tmp_path: Path
) -> None:
    process = parent("save")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: none_left(tmp_path))
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("manner", ["normal", "ignore", "save"])
def test_a_stop_is_over_when_it_returns(leader: Callable[[str], list[str]], tmp_path: Path, manner: str) -> None:
    process = start_supervised(leader(manner), log_file=tmp_path / "stage.log", grace_s=1.0)
    wait_for((tmp_path / "pids").exists)
    stop_supervised(process, grace_s=1.0)
    assert process.returncode == 143
    assert none_left(tmp_path)
    assert (tmp_path / "saved").exists() == (manner == "save")


def test_a_time_out_ends_the_stage_and_its_ranks(leader: Callable[[str], list[str]], tmp_path: Path) -> None:
    with pytest.raises(StageTimeoutError, match=r"not done after 1\.5 s"):
        run_supervised(leader("normal"), log_file=tmp_path / "a.log", on_line=lambda _: None, grace_s=1.0, timeout_s=1.5)
    assert none_left(tmp_path)


@pytest.mark.parametrize(("code", "expected"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137), ("", 0)])
def test_the_exit_code_comes_through(code: str, expected: int, tmp_path: Path) -> None:
    assert run_python(code, tmp_path)[0] == expected


def test_a_daemon_left_by_a_stage_that_ended_well_is_swept(tmp_path: Path) -> None:
    code, tail = run_python(
        "import subprocess; print(subprocess.Popen(['sleep', '120'], start_new_session=True).pid, flush=True)", tmp_path
    )
    assert code == 0
    assert not alive(int(tail))


def test_lines_arrive_whole_and_the_log_keeps_earlier_attempts(tmp_path: Path) -> None:
    lines: list[str] = []
    split_character = """
    import os, time
    os.write(1, "10%\\r20%\\nnaïv".encode()[:-2]); time.sleep(0.5)
    os.write(1, "ïve é".encode()[1:] + b"\\n"); os.write(2, b"to stderr\\n"); os.write(1, b"no newline")
    """
    (tmp_path / "a.log").write_text("an earlier attempt\n")
    code, tail = run_python(split_character, tmp_path, lines, poll_s=0.05)
    assert code == 0
    assert lines[:2] == ["10%", "20%"]
    assert lines[-2:] == ["to stderr", "no newline"]
    assert "\ufffd" not in "".join(lines)
    assert tail.splitlines() == lines
    assert (tmp_path / "a.log").read_text().startswith("an earlier attempt\n10%")


def test_a_command_that_cannot_start_says_so_in_the_log(tmp_path: Path) -> None:
    code, tail = run_supervised(["/no/such/program"], log_file=tmp_path / "a.log", on_line=lambda _: None)
    assert code == 1
    assert "/no/such/program" in tail
