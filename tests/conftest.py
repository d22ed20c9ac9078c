"""What every test stands on: no vendor, no hub and no server but those a test starts itself; the same examples every time."""

from __future__ import annotations

import os
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

# These machines are noisy: time limits of single examples would only measure the neighbours.
settings.register_profile(
    "dpo-loop", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("dpo-loop")

TINY_CONFIG = Path(__file__).parents[1] / "deploy" / "configs" / "tiny-test.yaml"


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with PrefectServer(tmp_path_factory.mktemp("prefect")).running() as server:
        yield server


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """The tiny config played to its end by the command line, which starts what it needs. Read it or copy it; do not change it."""
    run = RunDir(tmp_path_factory.mktemp("whole") / "run")
    command = [sys.executable, "-m", "flows.cli", "run", str(TINY_CONFIG), "--set", f"run_dir={run.path}"]
    played = subprocess.run(command, capture_output=True, text=True, check=False)
    assert played.returncode == 0, played.stdout[-3000:] + played.stderr[-3000:]
    return run
