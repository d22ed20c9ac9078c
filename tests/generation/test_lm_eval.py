"""Tasks of lm-eval-harness, against transformers and peft by hand. Skipped only where lm_eval cannot be imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import read_manifest
from dpo_loop.errors import InputError, InvalidRoundError
from dpo_loop.exchange import read_conditions
from dpo_loop.files import write_jsonl
from tests.generation.conftest import logprobs
from tests.generation.producing import CHOICES, lm_eval, needs_lm_eval, produce
from tests.generation.worlds import World


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of lm-eval tasks: `which`, multiple choice with one question there twice, and `book`, a text."""
    folder = tmp_path_factory.mktemp("harness")
    rows = [{"q": f"which words, {n % 6}?", "c": CHOICES, "a": n % 3} for n in range(7)]
    write_jsonl(folder / "which.jsonl", rows)
    write_jsonl(folder / "book.jsonl", [{"text": f"say the words {n} times"} for n in range(12)])
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


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_rows_are_what_transformers_and_peft_say(world: World, harness: Path, tmp_path: Path) -> None:
    book = lm_eval(harness, "book", metric="word_perplexity", chat_template=False)
    rows = produce(tmp_path / "out", world.policy(), lm_eval(harness, "which"), book)
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
    texts = {f"say the words {n} times": 5.0 for n in range(12)}
    book_rows = [row for row in rows if row.task == "book"]
    # lm-eval begins a text with the end-of-turn token, where there is no BOS
    assert sorted(row.value for row in book_rows) == pytest.approx(sorted(-total("<|end|>", text) for text in texts), abs=1e-3)
    assert {(row.measure, row.weight) for row in book_rows} == {("nll", 5.0)}
    assert read_manifest(tmp_path / "out").outcome.metrics["tasks"]["which"]["accuracy"] == pytest.approx(right / 7)
    conditions = read_conditions(tmp_path / "out")
    assert conditions.canary["distance"] < 1e-4
    assert {"which/lm-eval", "which/torch", "which/transformers", "which/peft"} < conditions.versions.keys()


@needs_lm_eval
@pytest.mark.slow
def test_the_first_samples_have_the_same_ids_for_every_policy(world: World, harness: Path, tmp_path: Path) -> None:
    task = lm_eval(harness, "which", limit=5, num_fewshot=0)
    one, other = (produce(tmp_path / policy.key, policy, task) for policy in (world.policy(), world.base_policy()))
    assert [row.item_id for row in one] == [row.item_id for row in other]
    assert len(one) == 5


@needs_lm_eval
@pytest.mark.slow
def test_lm_eval_complaints_are_sentences(world: World, harness: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lm-eval knows no task nowhere"):
        produce(tmp_path / "task", world.policy(), lm_eval(harness, "nowhere"))
    with pytest.raises(InputError, match=r"metric f1 does not name one figure of lm-eval task which; it has acc,none"):
        produce(tmp_path / "metric", world.policy(), lm_eval(harness, "which", metric="f1"))


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
        produce(tmp_path / "out", swapped, lm_eval(harness, "which", python=str(python)))
