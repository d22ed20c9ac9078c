"""Capability tasks of other libraries. What needs lm_eval or inspect_ai is skipped only where it cannot be imported; the rest always runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.config import CapabilityConfig, InspectTask, LmEvalTask, ProducedTask
from dpo_loop.errors import ConfigError, DpoLoopError, InputError, InvalidRoundError, StageFailedError
from dpo_loop.exchange import read_capability
from dpo_loop.files import write_jsonl
from dpo_loop.generation.capability import CAPABILITY
from dpo_loop.generation.producers.start import producer_problems
from dpo_loop.policies import describe_policy
from dpo_loop.types import CapabilityRow, PolicyRef
from tests.generation.conftest import logprobs
from tests.generation.worlds import ENGINE, World

CHOICES = ["five", "count to five", "upper case words in five"]
needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
needs_inspect = pytest.mark.skipif(importlib.util.find_spec("inspect_ai") is None, reason="inspect_ai is not installed")


def play(out: Path, policy: PolicyRef, *tasks: ProducedTask) -> list[CapabilityRow]:
    files = tuple(None if task.path is None else Path(task.path) for task in tasks)
    materialize(CAPABILITY, out, policy=policy, engine=ENGINE, config=CapabilityConfig(tasks=tasks), files=files, seed=3)
    return list(read_capability(out))


# ------------------------------------------------------------------------------------------------------------- lm_eval


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lm-eval tasks: `which`, multiple choice with one question there twice, and `book`, a text."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [{"q": f"which words, {n % 6}?", "c": CHOICES, "a": n % 3} for n in range(7)]
    write_jsonl(folder / "which.jsonl", rows)
    write_jsonl(folder / "book.jsonl", [{"text": f"say the words {n} times"} for n in range(4)])
    data = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {name}.jsonl}}}}\ntest_split: test\n"
    (folder / "which.yaml").write_text(
        f"task: which\n{data.format(name='which')}output_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{c}}"\ndoc_to_target: "{{a}}"\nmetric_list: [{metric: acc}]\n'
    )
    (folder / "book.yaml").write_text(
        f"task: book\n{data.format(name='book')}output_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: word_perplexity}]\n'
    )
    (folder / "json.py").write_text("raise ImportError('not the json that was meant')\n")
    return folder


def lm_eval(folder: Path | None, *names: str, **fields: object) -> LmEvalTask:
    return LmEvalTask(kind="lm_eval", id="-".join(names), tasks=names, path=None if folder is None else str(folder), **fields)


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_rows_are_what_transformers_and_peft_say(world: World, harness: Path, tmp_path: Path) -> None:
    book = lm_eval(harness, "book", metric="word_perplexity", chat_template=False)
    rows = play(tmp_path / "out", world.policy(), lm_eval(harness, "which"), book)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32), world.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)

    def total(before: str, text: str) -> float:
        return sum(logprobs(model, tokenizer.encode(before), tokenizer.encode(text, add_special_tokens=False)))

    right = 0
    for n in range(7):
        sums = [total(f"<|user|>which words, {n % 6}?<|end|><|assistant|>", choice) for choice in CHOICES]
        right += sums.index(max(sums)) == n % 3
    which = [row for row in rows if row.task == "which"]
    assert (len(which), len({row.item_id for row in which}), sum(row.value for row in which)) == (7, 7, right)
    texts = {f"say the words {n} times": 5.0 for n in range(4)}
    book_rows = [row for row in rows if row.task == "book"]
    # lm-eval begins a text with the end-of-turn token, where there is no BOS
    assert sorted(row.value for row in book_rows) == pytest.approx(sorted(-total("<|end|>", text) for text in texts), abs=1e-3)
    assert {(row.measure, row.weight) for row in book_rows} == {("nll", 5.0)}
    assert read_manifest(tmp_path / "out").outcome.metrics["tasks"]["which"]["accuracy"] == pytest.approx(right / 7)


@needs_lm_eval
@pytest.mark.slow
def test_the_first_samples_have_the_same_ids_for_every_policy(world: World, harness: Path, tmp_path: Path) -> None:
    task = lm_eval(harness, "which", limit=5, num_fewshot=0)
    one, other = (play(tmp_path / policy.key, policy, task) for policy in (world.policy(), world.base_policy()))
    assert [row.item_id for row in one] == [row.item_id for row in other]
    assert len(one) == 5


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_complaints_are_sentences(world: World, harness: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lm-eval knows no task nowhere"):
        play(tmp_path / "task", world.policy(), lm_eval(harness, "nowhere"))
    with pytest.raises(InputError, match=r"metric f1 does not name one figure of lm-eval task which; it has acc,none"):
        play(tmp_path / "metric", world.policy(), lm_eval(harness, "which", metric="f1"))


@needs_lm_eval
@pytest.mark.slow
def test_a_producer_that_loaded_other_weights_is_stopped_by_the_canary(world: World, harness: Path, tmp_path: Path) -> None:
    policy = world.policy()
    copy = tmp_path / "adapter"
    copy.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (copy / name).write_bytes((world.adapter / name).read_bytes())
    # an interpreter that swaps the weights once the stage has looked at them
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/sh\n[ \"$1\" = -m ] && cp '{world.other_adapter}/adapter_model.safetensors' '{copy}/'\nexec '{sys.executable}' \"$@\"\n"
    )
    python.chmod(0o755)
    swapped = policy.model_copy(update={"adapter": str(copy)})
    with pytest.raises(InvalidRoundError, match=r"capability task which: the engine does not (serve|apply) th"):
        play(tmp_path / "out", swapped, lm_eval(harness, "which", python=str(python)))


# ---------------------------------------------------------------------------------------------------------- inspect_ai


@pytest.fixture(scope="session")
def inspected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with tasks that are `plain`; `torn`, with samples that fail or get no grade; and such as cannot be used."""
    file = tmp_path_factory.mktemp("inspected") / "tasks.py"
    file.write_text(
        """
from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import GenerateConfig
from inspect_ai.scorer import Score, accuracy, includes, match, metric, scorer
from inspect_ai.solver import generate, solver

SHORT = GenerateConfig(max_tokens=6)
SAMPLES = MemoryDataset([Sample(input=f"count to {n}", target=target) for n, target in enumerate(["e", "?", "e", "", "w"])])


@task
def plain(targets: int = 5):
    return Task(dataset=SAMPLES, solver=generate(), scorer=includes(), config=SHORT)


@scorer(metrics=[accuracy()])
def torn_scorer():
    async def score(state, target):
        n = int(state.input_text[-1])
        return [Score(value="C"), Score(value="P"), Score(value=float("nan")), None, Score(value=0)][n]

    return score


@solver
def fails_on_the_last():
    async def solve(state, generate):
        if state.input_text.endswith("4"):
            raise ValueError("a sample that fails")
        return await generate(state)

    return solve


@task
def torn():
    return Task(dataset=SAMPLES, solver=fails_on_the_last(), scorer=torn_scorer(), config=SHORT)


@task
def two():
    return Task(dataset=SAMPLES, solver=generate(), scorer=[includes(), match()], config=SHORT)


@scorer(metrics=[accuracy()])
def several():
    async def score(state, target):
        return Score(value={"a": 1, "b": 0})

    return score


@task
def graded_twice():
    return Task(dataset=SAMPLES, solver=generate(), scorer=several(), config=SHORT)


@metric
def failing():
    def figure(scores):
        raise ValueError("a metric that fails")

    return figure


@task
def ruined():
    return Task(dataset=SAMPLES, solver=generate(), scorer=includes(), metrics=[failing()], config=SHORT)
"""
    )
    return file


def inspect(file: Path, task: str, **fields: object) -> InspectTask:
    return InspectTask(kind="inspect", id=task, task=task, path=str(file), **fields)


@needs_inspect
@pytest.mark.slow
def test_inspect_rows_are_scores_of_the_policys_greedy_answers(world: World, inspected: Path, tmp_path: Path) -> None:
    rows = play(tmp_path / "out", world.policy(), inspect(inspected, "plain", limit=4, arguments={"targets": 4}))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32), world.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    expected = []
    for n, target in enumerate(["e", "?", "e", ""]):
        prompt = tokenizer(f"<|user|>count to {n}<|end|><|assistant|>", add_special_tokens=False, return_tensors="pt")
        prompt.pop("token_type_ids", None)
        ids = model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        said = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        expected.append((said, float(target in said.lower())))
    assert sorted((row.response, row.value) for row in rows) == sorted(expected)
    other = play(tmp_path / "base", world.base_policy(), inspect(inspected, "plain", limit=4, arguments={"targets": 4}))
    assert [row.item_id for row in other] == [row.item_id for row in rows]


@needs_inspect
@pytest.mark.slow
def test_inspect_samples_that_failed_or_were_not_graded_are_unscored_and_partial_is_wrong(
    world: World, inspected: Path, tmp_path: Path
) -> None:
    rows = play(tmp_path / "out", world.policy(), inspect(inspected, "torn"))
    assert sorted(str(row.value) for row in rows) == ["0.0", "1.0", "None", "None", "None"]


@needs_inspect
@pytest.mark.slow
def test_inspect_complaints_are_sentences(world: World, inspected: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must name one of the scorers of inspect_ai task two: includes, match"):
        play(tmp_path / "two", world.policy(), inspect(inspected, "two"))
    with pytest.raises(InputError, match="scorer several of inspect_ai task graded_twice gives several figures"):
        play(tmp_path / "graded_twice", world.policy(), inspect(inspected, "graded_twice"))
    with pytest.raises(InvalidRoundError, match=r"inspect_ai could not play task ruined: .*a metric that fails"):
        play(tmp_path / "ruined", world.policy(), inspect(inspected, "ruined"))


# --------------------------------------------------------------------------------------------------- without a library


def test_an_interpreter_without_the_library_is_named_before_anything_starts(world: World, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    (tmp_path / "t.py").touch()
    with pytest.raises(ConfigError) as caught:
        play(tmp_path / "out", world.policy(), lm_eval(None, "arc_easy", python=bare), inspect(tmp_path / "t.py", "t", python=bare))
    harness, other = caught.value.problems
    assert harness.startswith(f"capability.tasks.arc_easy: {bare} has no lm_eval, transformers, peft, pydantic")
    assert f"{bare} -m pip install lm-eval transformers peft pydantic" in harness
    assert "has no inspect_ai" in other
    assert "dpo-loop[inspect-ai]" in other


def test_an_interpreter_that_is_none_is_named(tmp_path: Path) -> None:
    [problem] = producer_problems([lm_eval(None, "arc_easy", python=str(tmp_path / "nowhere"))])
    assert problem.startswith(f"capability.tasks.arc_easy.python: {tmp_path / 'nowhere'} does not run")


def stand_in(path: Path, body: str) -> str:
    """An interpreter that has everything and plays `body` instead of a producer."""
    path.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nif sys.argv[1] == '-c':\n    sys.exit()\n"
        f"request = json.load(open(sys.argv[3]))\n{body}\n"
    )
    path.chmod(0o755)
    return str(path)


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
        play(tmp_path / "out", world.policy(), task)
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
    [found] = play(Path("out"), policy, lm_eval(Path("tasks"), "t", python=python))
    assert found == CapabilityRow(task="t", item_id="i", measure="correct", value=1.0, response=str(tmp_path / "tasks"))


def test_what_a_producer_imports_of_dpo_loop_is_light() -> None:
    code = (
        "import sys, dpo_loop.generation.producers.request; print(json.dumps([m for m in ('vllm', 'torch') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", f"import json; {code}"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
