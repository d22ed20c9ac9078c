"""deploy/prefect.yaml deploys as it is, and a round triggered by REST plays on a real server and worker."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_loop.layout import RunDir
from flows.config import ConfigFile, RunConfig, read_raw
from flows.rounds import RoundState, next_round, state_of
from flows.steps import read_run_config
from tests.prefect_server import PrefectServer, wait_for

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


@pytest.fixture(scope="module")
def server(prefect_server: PrefectServer) -> Iterator[PrefectServer]:
    """A process worker on the session's server, deployed from deploy/prefect.yaml."""
    assert prefect_server.ask("/work_pools/", {"name": "dpo-loop", "type": "process"})[0] == 201
    prefect_server.prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_FILE.relative_to(ROOT)))
    with prefect_server.background("worker", "worker", "start", "--pool", "dpo-loop"):
        yield prefect_server


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_round_triggered_by_rest_plays_and_its_artifacts_can_be_read(
    server: PrefectServer, whole_run: RunDir, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(whole_run.path, run.path)
    number = next_round(run)
    config = read_raw(TINY_CONFIG) | {"run_dir": str(run.path)}
    status, deployment = server.ask("/deployments/name/dpo-next-round/round")
    assert status == 200
    create = f"/deployments/{deployment['id']}/create_flow_run"

    status, refusal = server.ask(create, {"parameters": {"config": config | {"rounds": 0}}})
    assert status == 409, "the server checks parameters against the schema of RunConfig"
    assert "config" in str(refusal)

    parameters = {"config": config, "overrides": ["stage_retries=1"]}
    status, created = server.ask(create, {"parameters": parameters, "name": "by-rest"})
    assert status == 201

    def ended() -> bool:
        return server.ask(f"/flow_runs/{created['id']}")[1]["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    wait_for(ended, "the end of the flow run", 600)
    flow_run = server.ask(f"/flow_runs/{created['id']}")[1]
    assert flow_run["state_type"] == "COMPLETED", _logs(server, created["id"])
    assert state_of(run, number) in (RoundState.FINISHED, RoundState.WAITING)
    assert read_run_config(run).stage_retries == 1

    _, subflows = server.ask(
        "/flow_runs/filter", {"flow_runs": {"parent_task_run_id": {"is_null_": False}}, "sort": "START_TIME_DESC"}
    )
    assert f"tiny-test-r{number:03d}" in [subflow["name"] for subflow in subflows]
    played = next(subflow for subflow in subflows if subflow["name"] == f"tiny-test-r{number:03d}")
    _, tasks = server.ask("/task_runs/filter", {"flow_runs": {"id": {"any_": [played["id"]]}}, "sort": "NAME_ASC"})
    assert {"prompts", "generate", "gate", "report"} <= {task["name"] for task in tasks}

    _, page = server.ask("/artifacts/tiny-test-round/latest")
    assert page["data"].startswith(f"# tiny-test, round {number}")
    _, table = server.ask("/artifacts/tiny-test-gate/latest")
    assert json.loads(table["data"])[0]["round"] == number


def _logs(server: PrefectServer, flow_run_id: str) -> str:
    _, lines = server.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [flow_run_id]}}, "limit": 200})
    return "\n".join(line["message"] for line in lines)
