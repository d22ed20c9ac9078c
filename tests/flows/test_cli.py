"""The command line is light, says what went wrong in a sentence, and ends with the codes that scripts rely on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_loop.artifacts import scratch
from dpo_loop.errors import CorruptArtifactError, InputError, NoPairsError, StageFailedError
from dpo_loop.exchange import SEED_VERSION
from dpo_loop.files import hold
from dpo_loop.layout import RunDir
from dpo_loop.types import GateState
from flows.approval import decide
from flows.failures import read_failure, stage_error
from flows.rounds import RoundState, begin_round, current_policy, read_round, state_of, stop_reason
from flows.show import policy_word, run_status
from flows.steps import is_current, read_run_config, run_step
from flows.summary import summaries
from tests.flows.runs import judged_round, played_round, publish, raw_config, started_run, write_config

HEAVY = ("torch", "vllm", "transformers", "prefect", "openai", "anthropic", "peft", "datasets", "scipy", "rich")


CONSOLE_SCRIPT = "import sys; sys.path[:] = [path for path in sys.path if path]; from flows.cli import main; main(sys.argv[1:])"


def console_script(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """As an installed `dpo-loop` starts: without the working directory on its path."""
    return subprocess.run([sys.executable, "-c", CONSOLE_SCRIPT, *words], capture_output=True, text=True, check=False, cwd=cwd)


def cli(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flows.cli", *words], capture_output=True, text=True, check=False, env=os.environ | env
    )


def test_importing_the_packages_and_the_command_line_loads_nothing_heavy() -> None:
    code = f"import sys, dpo_loop, judges, flows, flows.cli; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["steps", "rounds", "approval", "summary", "show", "preflight", "supervise", "play"])
def test_only_the_flows_themselves_load_prefect(module: str) -> None:
    code = f"import sys, flows.{module}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    done = cli("--help")
    for command in (
        "demo",
        "run",
        "round",
        "step",
        "status",
        "show",
        "approve",
        "reject",
        "gate",
        "report",
        "export",
        "card",
        "serve-report",
        "doctor",
    ):
        assert f"  {command} " in done.stdout


def test_show_ends_with_one_json_line(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    played_round(run, 2, GateState.FAIL)
    done = cli("show", str(tmp_path), "--json")
    rounds = json.loads(done.stdout.splitlines()[-1])["rounds"]
    assert [(row["round"], row["gate"], row["promoted"]) for row in rounds] == [
        (0, None, True),
        (1, "PASS", True),
        (2, "FAIL", False),
    ]
    assert rounds[0]["parent"] is None
    assert Path(rounds[1]["report"]).is_file()
    assert set(rounds[1]) >= {"num_pairs", "pass_rate", "win_rate_previous", "win_rate_anchor", "harmful_rate", "over_refusal_rate"}
    assert rounds[1]["seconds"].keys() >= {"train", "gate", "report"}
    assert cli("show", str(tmp_path), "2").returncode == 0
    assert cli("show", str(tmp_path), "7").returncode == 2


def test_a_round_that_has_not_ended_is_shown_as_what_it_is(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.FAIL)
    begin_round(run, 2)
    assert [policy_word(run, row) for row in summaries(run)] == ["start", "kept", "playing"]
    judged_round(run, 2, GateState.NEEDS_REVIEW)
    assert [policy_word(run, row) for row in summaries(run)] == ["start", "kept", "waiting"]
    assert "next" not in run_status(run)
    decide(run, 2, "approve", reviewer="ann", reason="fine")
    assert "the command that plays this run ends the round" in run_status(run)["next"]
    assert [policy_word(run, row) for row in summaries(run)] == ["start", "kept", "playing"]
    shown = cli("show", str(run.path)).stdout.splitlines()
    assert any(" kept " in line for line in shown)
    assert any(" playing " in line for line in shown)


def test_a_loop_that_stops_early_says_what_lets_it_go_on(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", max_consecutive_failures=1))
    run = started_run(tmp_path / "run", max_consecutive_failures=1)
    played_round(run, 1, GateState.FAIL)
    done = cli("run", str(config))
    assert done.returncode == 10
    assert "raise max_consecutive_failures, or play one more with `dpo-loop round CONFIG`" in done.stdout
    used_up = started_run(tmp_path / "used", prompts={"pool": {"kind": "jsonl", "path": "world:pool.jsonl"}, "num_buckets": 1})
    played_round(used_up, 1, GateState.PASS)
    stop = stop_reason(used_up, read_run_config(used_up))
    assert "prompts.reuse to `cycle`" in str(stop)


def test_a_directory_without_a_run_is_named(tmp_path: Path) -> None:
    for words in (("show", str(tmp_path)), ("status", str(tmp_path)), ("step", "train", "--run", str(tmp_path), "--round", "1")):
        done = cli(*words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is not a run directory" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "name", "text"),
    [
        ("show", "run.json", "not JSON"),
        ("status", "run.json", '{"from": "another version"}'),
        ("status", "current.json", "not JSON"),
        ("show", "rounds/001/round.json", '{"from": "another version"}'),
        ("status", "rounds/002/failed/pair.json", ""),
    ],
)
def test_a_file_of_a_run_that_cannot_be_read_is_named(tmp_path: Path, command: str, name: str, text: str) -> None:
    run = started_run(tmp_path)
    played_round(run, 1, GateState.PASS)
    begin_round(run, 2)
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).write_text(text)
    done = cli(command, str(run.path))
    assert done.returncode == 2
    assert f"{run.path / name} is not a " in done.stderr
    assert "Traceback" not in done.stderr


def test_a_finished_run_is_checked_and_shown_without_prefect(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", rounds=1))
    run = started_run(tmp_path / "run", rounds=1)
    played_round(run, 1, GateState.PASS)
    done = cli("run", str(config), "--json", PREFECT_API_URL="http://127.0.0.1:9/api")  # nobody answers there
    assert (done.returncode, done.stderr) == (0, "")
    assert "nothing left to play: all rounds are played" in done.stdout
    assert json.loads(done.stdout.splitlines()[-1])["rounds"][1]["promoted"] is True
    assert run.index_page.is_file()
    page = run.round(1).report_page
    page.write_bytes(page.read_bytes() + b" ")
    done = cli("run", str(config))
    assert done.returncode == 2
    assert "has changed since stage report published it" in done.stderr


def test_a_prefect_api_that_does_not_answer_is_named_with_the_way_out(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", rounds=1))
    run = started_run(tmp_path / "run", rounds=1)
    done = cli("run", str(config), PREFECT_API_URL="http://127.0.0.1:9/api")  # nobody answers there
    assert done.returncode == 75
    assert "the Prefect API at http://127.0.0.1:9/api does not answer" in done.stderr
    assert "unset PREFECT_API_URL" in done.stderr
    assert "Traceback" not in done.stderr
    assert state_of(run, 1) is RoundState.NEW


def test_a_second_process_on_the_same_run_is_told_who_holds_it(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run"))
    run = started_run(tmp_path / "run")
    with hold(run.lease, wait_s=0, what="run"):
        done = cli("run", str(config))
        status = json.loads(cli("status", str(run.path), "--json").stdout)
    assert done.returncode == 75
    assert f"pid {os.getpid()}" in done.stderr
    assert status["player_pid"] == os.getpid()


def test_a_stage_that_fails_leaves_its_reason_and_a_success_clears_it(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.PASS)
    done = cli("step", "pair", "--run", str(tmp_path), "--round", "1")
    failure = read_failure(run.round(1), "pair")
    assert failure is not None
    assert done.returncode == failure.exit_code == 2
    assert failure.message in done.stderr
    error = stage_error(run.round(1), "pair", 2, "")
    assert type(error) is InputError
    assert str(error) == failure.message
    run.round(1).failure("report").write_text(failure.model_dump_json())
    run_step(run, 1, "report")
    assert read_failure(run.round(1), "report") is None


@pytest.mark.parametrize(
    ("name", "round_number", "says"),
    [
        ("foo", 1, "round 1 has no stage foo"),
        ("train", 1, "round 1 of"),
        ("gate", 0, "round 0 has no stage gate"),
        ("pair", 7, "round 7 of"),
    ],
)
def test_a_stage_that_cannot_be_is_refused_and_begins_no_round(tmp_path: Path, name: str, round_number: int, says: str) -> None:
    run = started_run(tmp_path)
    before = sorted(run.path.rglob("*"))
    done = cli("step", name, "--run", str(run.path), "--round", str(round_number))
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(run.path.rglob("*")) == before


def test_a_verifier_of_the_working_directory_is_found_by_the_check_and_by_a_step_by_hand(tmp_path: Path) -> None:
    (tmp_path / "my_verifier.py").write_text("def score(prompt, text):\n    return 1.0\n")
    judge = {"kind": "verifier", "function": "my_verifier:score"}
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "unplayed", judge=judge, surprise=1))
    checked = console_script("run", str(config), cwd=tmp_path)
    assert "surprise: unknown key" in checked.stderr
    assert "my_verifier" not in checked.stderr
    run = started_run(tmp_path / "run", judge=judge)
    begin_round(run, 1)
    publish(run.round(1).stage("prompts"), {"prompts.jsonl": ""})
    publish(run.round(1).stage("generate"), {"completions-00000.jsonl": ""})
    stepped = console_script("step", "judge", "--run", str(run.path), "--round", "1", cwd=tmp_path)
    assert "cannot import" not in stepped.stderr
    assert stepped.returncode == 0, stepped.stderr


def test_a_stage_that_says_nothing_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    begin_round(run, 1)
    killed = stage_error(run.round(1), "train", 137, "step 3/9\nKilled")
    assert isinstance(killed, StageFailedError)
    assert killed.retryable
    assert "step 3/9\nKilled" in str(killed)
    assert not stage_error(run.round(1), "train", 1, "Traceback").retryable


def test_an_error_keeps_its_class_across_processes(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    begin_round(run, 1)
    here = run.round(1)
    here.failure("pair").parent.mkdir()
    here.failure("pair").write_text(
        '{"kind": "NoPairsError", "message": "8 ties", "exit_code": 13, "retryable": false, "failed_at": ""}'
    )
    assert type(stage_error(here, "pair", 13, "")) is NoPairsError


def test_a_stage_from_other_inputs_or_another_version_or_with_scratch_left_is_not_taken_for_current(tmp_path: Path) -> None:
    run = started_run(tmp_path)
    judged_round(run, 1, GateState.PASS)
    assert is_current(run, 1, "report")
    (scratch(run.round(1).stage("report")) / "half").write_text("left by a kill")
    assert not is_current(run, 1, "report")
    run_step(run, 1, "report")
    assert is_current(run, 1, "report")
    manifest = run.round(1).stage("report") / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"dpo-loop": "', '"dpo-loop": "0'))
    assert not is_current(run, 1, "report")
    manifest.write_text(text.replace('"round": 1', '"round": 2', 1))
    assert not is_current(run, 1, "report")
    manifest.write_text(re.sub(r'"version": \d+', '"version": 0', text, count=1))
    assert not is_current(run, 1, "report")
    manifest.write_text(text)
    run.round(1).report_page.write_text("")
    with pytest.raises(CorruptArtifactError):
        is_current(run, 1, "report")


def test_a_start_policy_of_another_version_is_noticed_without_loading_torch(tmp_path: Path) -> None:
    run = started_run(tmp_path, start={"kind": "model", "model": "org/model"})
    path = run.round(0).stage("seed") / "manifest.json"
    manifest = json.loads(path.read_text())
    start = read_run_config(run).start.model_dump(mode="json")
    code = (
        "import sys; from pathlib import Path; from dpo_loop.layout import RunDir; from flows.steps import is_current; "
        f"print(is_current(RunDir(Path({str(tmp_path)!r})), 0, 'seed'), [name for name in {HEAVY!r} if name in sys.modules])"
    )
    for version, current in ((SEED_VERSION, True), (SEED_VERSION + 1, False)):
        inputs = {"start": start, "model": None, "adapter": None, "demonstrations": None}
        path.write_text(json.dumps({**manifest, "version": version, "inputs": inputs}))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{current} []"


@pytest.mark.slow
def test_a_round_waits_for_a_person_and_goes_on_after_the_decision(tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", raw_config(tmp_path / "run", rounds=1))
    run = started_run(tmp_path / "run", rounds=1)
    judged_round(run, 1, GateState.NEEDS_REVIEW)
    waits = cli("run", str(config))
    assert waits.returncode == 12
    assert f"dpo-loop approve {run.path} 1 --reviewer NAME" in waits.stdout
    assert current_policy(run).round == 0
    decide(run, 1, "approve", reviewer="ann", reason="read the samples")
    goes_on = cli("run", str(config))
    assert goes_on.returncode == 0, goes_on.stdout + goes_on.stderr
    assert current_policy(run).round == 1


@pytest.mark.slow
def test_a_round_that_nobody_decides_in_time_keeps_the_policy(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = write_config(tmp_path / "c.yaml", raw_config(run.path, rounds=1, review_timeout_s=1))
    started_run(run.path, rounds=1)
    judged_round(run, 1, GateState.INCONCLUSIVE)
    done = cli("run", str(config))
    assert done.returncode == 11, done.stdout + done.stderr
    assert not read_round(run, 1).promoted
    assert current_policy(run).round == 0
