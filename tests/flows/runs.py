"""Run directories for tests, made by the product's own publishing: a config, and stages whose files are given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, materialize, now, scratch, sha256_file
from dpo_loop.files import write_json, write_text
from dpo_loop.layout import RunDir
from dpo_loop.policies import write_policy
from dpo_loop.types import GateReport, GateState, PolicyRef, StageOutcome
from flows.config import RunConfig
from flows.paths import resolve_paths
from flows.rounds import adopt_config, begin_round, finish_round
from flows.steps import run_step

POLICY = PolicyRef(base="org/base", base_sha256="b" * 64)


def raw_config(run_dir: Path, **changes: Any) -> dict[str, Any]:
    """The smallest whole config: a tiny world, the verifier judge, one check."""
    verifier = {"kind": "verifier", "function": "dpo_loop.quickstart.verifier:score"}
    return {
        "run_id": "small",
        "run_dir": str(run_dir),
        "world": {},
        "start": {"kind": "model", "model": "world:model"},
        "prompts": {"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}},
        "generation": {"engine": {"kind": "vllm_offline", "max_model_len": 128, "max_lora_rank": 16}, "max_new_tokens": 16},
        "judge": verifier,
        "training": {"loss": {"kind": "sigmoid"}},
        "answering": {"max_new_tokens": 16},
        "grading": {
            "task": {"kind": "verifier", "function": "dpo_loop.quickstart.verifier:task"},
            "safety": {"kind": "verifier", "function": "dpo_loop.quickstart.verifier:safety"},
        },
        "gate": {"checks": [{"id": "pass", "metric": "pass_rate", "rule": "non_inferior", "vs": "previous", "margin": 0.1}]},
        **changes,
    }


def small_config(run_dir: Path, **changes: Any) -> RunConfig:
    return resolve_paths(RunConfig.model_validate(raw_config(run_dir, **changes)))


def publish(directory: Path, files: Mapping[str, str]) -> None:
    """A published stage directory that holds these files."""

    def run(out: Path, *, files: Mapping[str, str]) -> StageOutcome:
        for name, text in files.items():
            write_text(out / name, text)
        return StageOutcome()

    materialize(Stage(directory.name, 1, run), directory, files=dict(files))


def publish_policy(directory: Path, policy: PolicyRef) -> None:
    def run(out: Path, *, policy: PolicyRef) -> StageOutcome:
        scratch(out)
        write_policy(out, policy)
        return StageOutcome()

    materialize(Stage(directory.name, 1, run), directory, policy=policy)


def started_run(path: Path, **changes: Any) -> RunDir:
    """A run whose round 0 has ended: the start policy is blessed."""
    run = RunDir(path)
    adopt_config(run, small_config(path, **changes))
    begin_round(run, 0)
    publish_policy(run.round(0).stage("seed"), POLICY)
    finish_round(run, 0)
    return run


def trained_policy(round_number: int) -> PolicyRef:
    return POLICY.model_copy(update={"adapter": f"org/adapter-{round_number}", "adapter_sha256": f"{round_number:064d}"})


def gate_report(round_number: int, state: GateState) -> GateReport:
    return GateReport(
        run_id="small",
        round=round_number,
        state=state,
        reasons=(f"because it is {state.value}",),
        candidate=trained_policy(round_number),
        previous=POLICY,
        anchor=POLICY,
        validity=(),
        checks=(),
        rates={},
        created_at=now(),
    )


def judged_round(run: RunDir, round_number: int, state: GateState) -> None:
    """A round whose gate and report are published: what is left is its end."""
    begin_round(run, round_number)
    here = run.round(round_number)
    publish_policy(here.stage("train"), trained_policy(round_number))
    before = run.round(round_number - 1).gate_report
    chained = sha256_file(before) if before.is_file() else None
    report = gate_report(round_number, state).model_copy(update={"previous_report_sha256": chained})
    publish(here.stage("gate"), {"gate_report.json": report.model_dump_json()})
    run_step(run, round_number, "report")


def played_round(run: RunDir, round_number: int, state: GateState) -> None:
    judged_round(run, round_number, state)
    finish_round(run, round_number)


def write_config(path: Path, raw: Mapping[str, Any]) -> Path:
    write_json(path, dict(raw))  # JSON is YAML
    return path
