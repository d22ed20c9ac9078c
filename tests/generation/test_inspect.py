"""Tasks of inspect_ai, against transformers and peft by hand. Skipped only where inspect_ai cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.errors import InputError, InvalidRoundError
from tests.generation.producing import inspect, needs_inspect, produce
from tests.generation.worlds import World


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


@needs_inspect
@pytest.mark.slow
def test_inspect_rows_are_scores_of_the_policys_greedy_answers(world: World, inspected: Path, tmp_path: Path) -> None:
    rows = produce(tmp_path / "out", world.policy(), inspect(inspected, "plain", limit=4, arguments={"targets": 4}))
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
    other = produce(tmp_path / "base", world.base_policy(), inspect(inspected, "plain", limit=4, arguments={"targets": 4}))
    assert [row.item_id for row in other] == [row.item_id for row in rows]


@needs_inspect
@pytest.mark.slow
def test_inspect_samples_that_failed_or_were_not_graded_are_unscored_and_partial_is_wrong(
    world: World, inspected: Path, tmp_path: Path
) -> None:
    rows = produce(tmp_path / "out", world.policy(), inspect(inspected, "torn"))
    assert sorted(str(row.value) for row in rows) == ["0.0", "1.0", "None", "None", "None"]


@needs_inspect
@pytest.mark.slow
def test_inspect_complaints_are_sentences(world: World, inspected: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must name one of the scorers of inspect_ai task two: includes, match"):
        produce(tmp_path / "two", world.policy(), inspect(inspected, "two"))
    with pytest.raises(InputError, match="scorer several of inspect_ai task graded_twice gives several figures"):
        produce(tmp_path / "graded_twice", world.policy(), inspect(inspected, "graded_twice"))
    with pytest.raises(InvalidRoundError, match=r"inspect_ai could not play task ruined: .*a metric that fails"):
        produce(tmp_path / "ruined", world.policy(), inspect(inspected, "ruined"))
