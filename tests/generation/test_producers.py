"""Capability tasks of other libraries without one: what an interpreter must have, how its process ends, what it hands over."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from dpo_loop.errors import ConfigError, DpoLoopError, InputError, InvalidRoundError, StageFailedError
from dpo_loop.exchange import read_conditions
from dpo_loop.generation.producers.request import Request, policy_on
from dpo_loop.generation.producers.start import producer_problems
from dpo_loop.policies import describe_policy
from dpo_loop.types import CapabilityRow
from tests.generation.producing import inspect, lm_eval, produce, stand_in, writes
from tests.generation.worlds import ENGINE, World


def test_an_interpreter_without_the_library_is_named_before_anything_starts(world: World, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    (tmp_path / "t.py").touch()
    with pytest.raises(ConfigError) as caught:
        produce(
            tmp_path / "out", world.policy(), lm_eval(None, "arc_easy", python=bare), inspect(tmp_path / "t.py", "t", python=bare)
        )
    harness, other = caught.value.problems
    assert harness.startswith(f"capability.tasks.arc_easy: {bare} has no lm_eval, transformers, peft, pydantic")
    assert f"{bare} -m pip install lm-eval transformers peft pydantic" in harness
    assert "has no inspect_ai" in other
    assert "dpo-loop[inspect-ai]" in other


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    [problem] = producer_problems([lm_eval(None, "arc_easy", python=str(tmp_path / "nowhere"))])
    assert problem.startswith(f"capability.tasks.arc_easy.python: {tmp_path / 'nowhere'} does not run")


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("open(request['problem'], 'w').write('no such metric'); sys.exit(2)", InputError, "capability task t: no such metric"),
        (
            "open(request['problem'], 'w').write('5 of 7 samples'); sys.exit(13)",
            InvalidRoundError,
            "capability task t: 5 of 7 samples",
        ),
        ("raise RuntimeError('out of memory')", StageFailedError, "RuntimeError: out of memory"),
        ("os.kill(os.getpid(), 9)", StageFailedError, "ended with exit code 137"),
        ("sys.exit(2)", StageFailedError, "ended with exit code 2"),
        ("open(request['rows'], 'w').write('{\"task\": 1}')", InputError, "is not a CapabilityRow"),
    ],
)
def test_how_a_producer_ends_is_how_the_stage_ends(
    world: World, tmp_path: Path, body: str, error: type[DpoLoopError], says: str
) -> None:
    task = lm_eval(None, "t", python=stand_in(tmp_path / "python", body))
    with pytest.raises(error, match=says):
        produce(tmp_path / "out", world.policy(), task)
    assert not (tmp_path / "out").exists()


def test_a_producer_works_beside_its_files_on_absolute_paths(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks").mkdir()
    row = "dict(task='t', item_id='i', measure='correct', value=1.0, response=os.getcwd())"
    python = stand_in(
        tmp_path / "python",
        f"assert all(os.path.isabs(request['policy'][name]) for name in ('base', 'adapter', 'canary'))\n"
        f"assert os.path.isabs(request['file'])\nopen(request['rows'], 'w').write(json.dumps({row}))",
    )
    policy = describe_policy(world.base, adapter=world.adapter, canary=world.canary)
    [found] = produce(Path("out"), policy, lm_eval(Path("tasks"), "t", python=python))
    assert found == CapabilityRow(task="t", item_id="i", measure="correct", value=1.0, response=str(tmp_path / "tasks"))


def test_what_a_producer_imports_of_dpo_loop_is_light() -> None:
    code = (
        "import sys, dpo_loop.generation.producers.request; print(json.dumps([m for m in ('vllm', 'torch') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


RIGHT = {"item_id": "i", "measure": "correct", "value": 1.0}
PROOF = {"num_tokens": 9, "distance": 0.001, "base_distance": 0.001, "effect": 0.9}


def proves(**figures: object) -> str:
    return f"; json.dump({ {**PROOF, **figures}!r}, open(request['proof'], 'w'))"


def test_a_process_leaves_the_figures_that_prove_its_policy(world: World, tmp_path: Path) -> None:
    names = {name: str(tmp_path / name) for name in ("rows", "problem", "proof")}
    request = Request(task=lm_eval(None, "t"), policy=world.policy(), engine=ENGINE, file=None, seed=0, **names)
    policy_on(request, AutoModelForCausalLM.from_pretrained(world.base))
    proof = json.loads((tmp_path / "proof").read_text())
    assert proof["distance"] < 1e-4
    assert proof["effect"] == pytest.approx(1, abs=1e-3)


def test_tasks_of_other_libraries_say_under_which_conditions_they_were_played(world: World, tmp_path: Path) -> None:
    near = lm_eval(None, "near", python=stand_in(tmp_path / "near", writes(RIGHT) + proves()))
    far_body = writes(RIGHT, {**RIGHT, "item_id": "j"}) + proves(distance=0.002, effect=0.8)
    far = lm_eval(None, "far", python=stand_in(tmp_path / "far", far_body, versions="{'lm-eval': '0.4.12'}"))
    produce(tmp_path / "out", world.policy(), near, far)
    conditions = read_conditions(tmp_path / "out")
    assert (conditions.policy_key, conditions.has_adapter) == (world.policy().key, True)
    assert conditions.canary == {**PROOF, "distance": 0.002, "effect": 0.8}  # of the process that is farther from the policy
    assert conditions.versions == {"near/lm-eval": "0.4.13", "near/torch": "2.13.0", "far/lm-eval": "0.4.12"}
    assert conditions.engine == {"dtype": "auto"}
    assert conditions.decoding == {}


def test_a_process_that_proved_nothing_leaves_no_figures(world: World, tmp_path: Path) -> None:
    proven = lm_eval(None, "proven", python=stand_in(tmp_path / "proven", writes(RIGHT) + proves()))
    silent = lm_eval(None, "silent", python=stand_in(tmp_path / "silent", writes(RIGHT)))
    produce(tmp_path / "out", world.policy(), proven, silent)
    conditions = read_conditions(tmp_path / "out")
    assert (conditions.has_adapter, conditions.canary) == (True, None)


def test_a_task_that_was_played_with_another_version_of_its_library_is_played_again(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "version").write_text("0.4.13")
    installed = f"{{'lm-eval': open({str(tmp_path / 'version')!r}).read()}}"
    played = f"open({str(tmp_path / 'played')!r}, 'a').write(request['task']['id'] + ' '); "
    crash = f"os.path.exists({str(tmp_path / 'mended')!r}) or sys.exit(1); "
    old = lm_eval(None, "old", python=stand_in(tmp_path / "old", played + writes(RIGHT), versions=installed))
    same = lm_eval(None, "same", python=stand_in(tmp_path / "same", played + writes(RIGHT)))
    last = lm_eval(None, "last", python=stand_in(tmp_path / "last", played + crash + writes(RIGHT)))
    with pytest.raises(StageFailedError):
        produce(tmp_path / "out", world.policy(), old, same, last)
    (tmp_path / "version").write_text("0.4.14")
    (tmp_path / "mended").touch()
    capsys.readouterr()
    produce(tmp_path / "out", world.policy(), old, same, last)
    assert (tmp_path / "played").read_text().split() == ["old", "same", "last", "old", "last"]
    assert read_conditions(tmp_path / "out").versions["old/lm-eval"] == "0.4.14"
    said = [line for line in capsys.readouterr().out.splitlines() if "other versions" in line]
    assert said == ["capability: old made anew, since begun with other versions: lm-eval was 0.4.13 and is 0.4.14"]


def test_the_complaint_of_an_earlier_process_is_not_taken_for_that_of_a_later_one(world: World, tmp_path: Path) -> None:
    crash = f"os.path.exists({str(tmp_path / 'mended')!r}) and os.kill(os.getpid(), 9); "
    complain = "open(request['problem'], 'w').write('no such metric'); sys.exit(2)"
    task = lm_eval(None, "t", python=stand_in(tmp_path / "python", crash + complain))
    with pytest.raises(InputError, match="no such metric"):
        produce(tmp_path / "out", world.policy(), task)
    (tmp_path / "mended").touch()
    with pytest.raises(StageFailedError, match="ended with exit code 137"):
        produce(tmp_path / "out", world.policy(), task)


def test_a_perplexity_of_a_handful_of_documents_is_refused(world: World, tmp_path: Path) -> None:
    nine = [{"item_id": f"i{n}", "measure": "nll", "value": 2.0, "weight": 1.0} for n in range(9)]
    with pytest.raises(InputError, match="capability task t has 9 documents"):
        produce(tmp_path / "out", world.policy(), lm_eval(None, "t", python=stand_in(tmp_path / "python", writes(*nine))))
    ten = [*nine, {**nine[0], "item_id": "i9"}]
    enough = lm_eval(None, "t", python=stand_in(tmp_path / "other", writes(*ten)))
    assert len(produce(tmp_path / "enough", world.policy(), enough)) == 10
