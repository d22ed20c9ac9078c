"""A real Prefect server on loopback, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class PrefectServer:
    """A Prefect server on loopback and what a client does with it: plain HTTP."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.home = home
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")},
            "PREFECT_HOME": str(home),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_WORKER_PREFETCH_SECONDS": "1",
            "DO_NOT_TRACK": "1",
            "OMP_NUM_THREADS": "1",
        }

    def prefect(self, *words: str) -> None:
        command = [sys.executable, "-m", "prefect", *words]
        ended = subprocess.run(command, env=self.env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
        assert ended.returncode == 0, ended.stdout + ended.stderr

    @contextmanager
    def background(self, name: str, *words: str) -> Iterator[None]:
        """`prefect WORDS` for the time of the block."""
        with (self.home / f"{name}.log").open("wb") as log:
            process = subprocess.Popen([sys.executable, "-m", "prefect", *words], env=self.env, cwd=ROOT, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @contextmanager
    def running(self) -> Iterator[PrefectServer]:
        with self.background("server", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)):
            wait_for(self.is_up, "the start of the server", 120)
            yield self

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
        """Status and content. While the database is busy the server says 503, upon which Prefect's own clients ask again, and so does this."""
        end = time.monotonic() + 60
        while (answer := self._ask(path, body))[0] == 503 and time.monotonic() < end:
            time.sleep(1)
        return answer

    def _ask(self, path: str, body: object) -> tuple[int, Any]:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.api + path, data=content, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def is_up(self) -> bool:
        try:
            return self.ask("/health")[0] == 200
        except OSError:
            return False


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s:.0f} s"
        time.sleep(0.5)
