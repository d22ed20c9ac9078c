"""deploy/prefect.yaml deploys as it is, and a round triggered by REST plays on a real server and worker."""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_loop.layout import RunDir
from flows.config import ConfigFile, RunConfig, read_raw
from flows.rounds import RoundState, state_of
from flows.steps import read_run_config

ROOT = Path(__file__).parents[2]
PREFECT_FILE = ROOT / "deploy" / "prefect.yaml"
DEPLOYMENTS: list[dict[str, Any]] = yaml.safe_load(PREFECT_FILE.read_text())["deployments"]
TINY_CONFIG = ROOT / "deploy" / "configs" / "tiny-test.yaml"


def test_the_deployments_are_loop_and_round() -> None:
    assert [deployment["name"] for deployment in DEPLOYMENTS] == ["loop", "round"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: str(deployment["name"]))
def test_its_entrypoint_is_a_flow_that_takes_its_parameters(deployment: dict[str, Any]) -> None:
    path, _, name = deployment["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    config = flow.validate_parameters(deployment["parameters"])["config"]
    assert isinstance(config, ConfigFile)
    whole = read_raw(ROOT / config.file)
    assert isinstance(flow.validate_parameters({"config": whole})["config"], RunConfig)
    with pytest.raises(Exception, match="Extra inputs are not permitted"):
        flow.validate_parameters({"config": {**whole, "surprise": 1}})


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda deployment: str(deployment["name"]))
def test_its_schedule_is_a_cron_that_is_off_and_runs_come_one_at_a_time(deployment: dict[str, Any]) -> None:
    from prefect.client.schemas.schedules import CronSchedule

    (schedule,) = deployment["schedules"]
    assert CronSchedule(cron=schedule["cron"], timezone=schedule["timezone"]).cron == schedule["cron"]
    assert schedule["active"] is False
    assert deployment["concurrency_limit"]["limit"] == 1


class Server:
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

    def background(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("wb") as log:
            return subprocess.Popen([sys.executable, "-m", "prefect", *words], env=self.env, cwd=ROOT, stdout=log, stderr=log)

    def ask(self, path: str, body: object = None) -> tuple[int, Any]:
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server and a process worker, deployed from deploy/prefect.yaml."""
    server = Server(tmp_path_factory.mktemp("prefect"))
    running = [server.background("server", "server", "start", "--host", "127.0.0.1", "--port", str(server.port))]
    try:
        wait_for(server.is_up, "the start of the server", 120)
        assert server.ask("/work_pools/", {"name": "dpo-loop", "type": "process"})[0] == 201
        server.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE.relative_to(ROOT)))
        running.append(server.background("worker", "worker", "start", "--pool", "dpo-loop"))
        yield server
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_round_triggered_by_rest_plays_and_its_artifacts_can_be_read(server: Server, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = read_raw(TINY_CONFIG) | {"run_id": "by-rest", "run_dir": str(run.path)}
    status, deployment = server.ask("/deployments/name/dpo-next-round/round")
    assert status == 200
    create = f"/deployments/{deployment['id']}/create_flow_run"

    status, refusal = server.ask(create, {"parameters": {"config": config | {"rounds": 0}}})
    assert status == 409, "the server checks parameters against the schema of RunConfig"
    assert "config" in str(refusal)

    parameters = {"config": config, "overrides": ["prompts.num_per_round=48"]}
    status, created = server.ask(create, {"parameters": parameters, "name": "by-rest-next"})
    assert status == 201

    def ended() -> bool:
        return server.ask(f"/flow_runs/{created['id']}")[1]["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    wait_for(ended, "the end of the flow run", 900)
    flow_run = server.ask(f"/flow_runs/{created['id']}")[1]
    assert flow_run["state_type"] == "COMPLETED", _logs(server, created["id"])
    assert state_of(run, 1) in (RoundState.FINISHED, RoundState.WAITING)
    assert read_run_config(run).prompts.num_per_round == 48

    _, subflows = server.ask("/flow_runs/filter", {"flow_runs": {"name": {"like_": "by-rest-r"}}, "sort": "NAME_ASC"})
    assert [subflow["name"] for subflow in subflows] == ["by-rest-r000", "by-rest-r001"]
    _, tasks = server.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [subflows[1]["id"]]}}, "sort": "NAME_ASC"})
    assert {"prompts", "generate", "gate", "report"} <= {task["name"] for task in tasks}

    _, page = server.ask("/artifacts/by-rest-round/latest")
    assert page["data"].startswith("# by-rest, round 1")
    _, table = server.ask("/artifacts/by-rest-gate/latest")
    assert json.loads(table["data"])[0]["round"] == 1


def _logs(server: Server, flow_run_id: str) -> str:
    _, lines = server.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "limit": 200})
    return "\n".join(line["message"] for line in lines)
