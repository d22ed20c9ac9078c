"""A Prefect API for a command that plays a run: the configured one, else a temporary one below our own supervisor.

Prefect would start a temporary server by itself, but that one outlives a `kill -9` of the command. Ours does not, keeps its database in the
run directory (migrated once), and writes to a log instead of the screen.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_loop.errors import DpoLoopError, ServerUnavailableError, StageFailedError, StorageError
from dpo_loop.layout import RunDir
from flows.supervise import start_supervised, stop_supervised

START_TIMEOUT_S = 120.0
MIN_FREE_BYTES = 1_000_000
_QUIET = {
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
    "PREFECT_CLI_PROMPT": "false",
    "DO_NOT_TRACK": "1",
}


@contextmanager
def prefect_api(run: RunDir) -> Iterator[None]:
    """Flows may be called inside. Raises ServerUnavailableError if the configured API does not answer, StageFailedError if the temporary
    server does not come up.

    Must be entered before anything of prefect is imported, since its settings are read then.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    if configured := PREFECT_API_URL.value():
        _check_answers(configured)
        yield
        return
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    log = run.path / "logs" / "prefect.log"
    database = run.path / ".prefect" / "prefect.db"
    for directory in (log.parent, database.parent):
        directory.mkdir(parents=True, exist_ok=True)
    server = start_supervised(
        [sys.executable, "-m", "uvicorn", "--factory", "prefect.server.api.server:create_app", *_uvicorn_options(port)],
        log_file=log,
        env={
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{database.absolute()}",
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        },
        grace_s=3.0,
    )
    try:
        end = time.monotonic() + START_TIMEOUT_S
        while not _healthy(url):
            if server.poll() is not None or time.monotonic() > end:
                raise _not_started(run, server.poll() or 1, log)
            time.sleep(0.2)
        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: False}):
            yield
    finally:
        stop_supervised(server, grace_s=3.0)


def _check_answers(url: str) -> None:
    """By Prefect's own client, which knows about keys, certificates and proxies."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError

    try:
        with get_client(sync_client=True) as client:
            error = client.api_healthcheck()
    except Exception as caught:  # entering the client may fail in as many ways
        error = caught
    if error is None or isinstance(error, PrefectHTTPStatusError):  # whatever it says, somebody is there
        return
    raise ServerUnavailableError(
        f"the Prefect API at {url} does not answer ({type(error).__name__}: {error}). Start it (`prefect server start`), or play with a "
        "temporary one: unset PREFECT_API_URL, or `prefect config unset PREFECT_API_URL` where a profile sets it."
    )


def _not_started(run: RunDir, exit_code: int, log: Path) -> DpoLoopError:
    if shutil.disk_usage(run.path).free < MIN_FREE_BYTES:
        return StorageError(
            f"the disk of {run.path} is full. Free some space, then run the same command again; what was finished is kept."
        )
    return StageFailedError("prefect server", exit_code, "\n".join(log.read_text(errors="replace").splitlines()[-15:]))


def _uvicorn_options(port: int) -> list[str]:
    return ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error", "--lifespan", "on"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
