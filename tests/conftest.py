"""What every test stands on: no vendor, no hub and no server but those a test starts itself; the same examples every time."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from dpo_loop.layout import RunDir
from tests.prefect_server import PrefectServer

for name in list(os.environ):
    if name.endswith("_BASE_URL") or name in {
        "OPENAI_API_KEY",
        "ANTHROPIC_API_KEY",
        "PREFECT_API_URL",
        "PREFECT_API_AUTH_STRING",
        "HF_TOKEN",
    }:
        del os.environ[name]
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
# Tests run side by side; the last bits of what is computed, which some of them compare, depend on it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# These machines are noisy: time limits of single examples would only measure the neighbours.
settings.register_profile(
    "dpo-loop", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dpo-loop")

TINY_CONFIG = Path(__file__).parents[1] / "deploy" / "configs" / "tiny-test.yaml"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, of these the ones with the longest time limits: workers of pytest-xdist take file after file and so end together."""
    of_file: dict[Path, tuple[bool, float]] = {}
    for item in items:
        limit = item.get_closest_marker("timeout")
        slowness = (item.get_closest_marker("slow") is not None, limit.args[0] if limit else 0)
        of_file[item.path] = max(slowness, of_file.get(item.path, (False, 0)))
    items.sort(key=lambda item: of_file[item.path], reverse=True)


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with PrefectServer(tmp_path_factory.mktemp("prefect")).running() as server:
        yield server


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The tiny config played to its end by the command line, which starts what it needs. Read it or copy it; do not change it.

    The first worker of pytest-xdist that wants it plays it, others wait; each has a copy, since `dpo-loop` takes the lock of a run it looks at.
    """
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    run, copy, ended = shared / "played", here / "whole", shared / "played.ended"
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY_CONFIG), "--set", f"run_dir={run}"]
    with (shared / "played.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not ended.exists():
            played = subprocess.run(command, capture_output=True, text=True, check=False)
            assert played.returncode == 0, played.stdout[-3000:] + played.stderr[-3000:]
            ended.touch()
    return RunDir(shutil.copytree(run, copy))
