"""The stage `capability`: its local tasks on the real vLLM against transformers by hand, played in a child process (play_capability.py)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import read_manifest
from dpo_loop.exchange import read_capability, read_conditions
from dpo_loop.files import write_jsonl
from dpo_loop.generation.conditions import engine_versions
from dpo_loop.generation.items import read_items
from dpo_loop.types import CapabilityRow
from tests.generation.conftest import logprobs
from tests.generation.play_capability import CONFIG, MAX_NEW_TOKENS
from tests.generation.worlds import ENGINE, World

pytestmark = pytest.mark.slow

TEXTS = [
    "say the words",
    "count to five in upper case, then say it",
    "é and ü\nin two lines",
    "say the words and count to five. " * 30,
    *(f"count to {n}" for n in range(7)),
]
BOOK = [text for text in TEXTS if text != TEXTS[3]]
CHOICES = ["five", "count to five", "upper case words in five"]
LONG = "say the words in upper case " * 60


class Played:
    """The stage as the child played it, and the same model in transformers+peft."""

    def __init__(self, world: World, root: Path) -> None:
        self.rows_dir = root / "rows"
        self.root = root
        base = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, world.adapter).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(world.base)

    def rows(self, task: str) -> dict[str, CapabilityRow]:
        return {row.item_id: row for row in read_capability(self.rows_dir) if row.task == task}

    def items(self, task: str) -> list[object]:
        [(config, file)] = [(t, self.root / t.path) for t in CONFIG.tasks if t.id == task]
        return list(read_items(config, file)[0])

    def in_order(self, task: str) -> list[CapabilityRow]:
        """By the lines of the file."""
        rows = self.rows(task)
        return [rows[item.id] for item in self.items(task)]

    def prompt_ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(f"<|user|>{text}<|end|><|assistant|>", add_special_tokens=False)

    def greedy(self, text: str) -> str:
        prompt = torch.tensor([self.prompt_ids(text)])
        ids = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=MAX_NEW_TOKENS, do_sample=False
        )
        return self.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def played(world: World, tmp_path_factory: pytest.TempPathFactory) -> Played:
    root = tmp_path_factory.mktemp("capability")
    played = Played(world, root)
    said = {text: played.greedy(text) for text in (f"count to {n}" for n in range(6))}
    exact = [{"prompt": text, "answer": [f"  {answer}\n", "?"], "source": "test"} for text, answer in said.items()]
    exact[1]["answer"] = "something else"
    exact[2] = {"messages": [{"role": "user", "content": "count to 2"}], "answer": said["count to 2"]}
    exact[3]["answer"] = said["count to 3"].swapcase()
    write_jsonl(root / "exact.jsonl", [*exact, {"prompt": LONG, "answer": "?"}])
    write_jsonl(root / "folded.jsonl", exact)
    choices = [{"prompt": f"which words, {n}?", "choices": CHOICES, "answer": n % 3} for n in range(7)]
    write_jsonl(root / "choices.jsonl", [*choices, {"prompt": LONG, "choices": CHOICES, "answer": 0}])
    write_jsonl(root / "texts.jsonl", [{"text": text} for text in TEXTS])
    (root / "book.txt").write_text("\n\n" + "\n  \n\n".join(BOOK) + "\r\n")
    with (root / "log").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", "tests.generation.play_capability", str(world.root), str(root)],
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, (root / "log").read_text()
    return played


def test_exact_match_is_of_the_whole_greedy_answer_without_the_white_space_around_it(played: Played) -> None:
    rows = played.in_order("exact")
    assert [row.value for row in rows] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, None]
    assert [row.response for row in rows[:6]] == [played.greedy(f"count to {n}") for n in range(6)]
    assert [row.value for row in played.in_order("folded")] == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("task", ["mean", "sum"])
def test_a_choice_is_as_likely_as_transformers_says_and_the_likeliest_one_counts(played: Played, task: str) -> None:
    seen = json.loads((played.root / "seen.json").read_text())[task]
    rows, items = played.in_order(task), played.items(task)
    assert (seen[-1], rows[-1].value) == ([None] * 3, None)  # does not fit
    for item, values, row in list(zip(items, seen, rows, strict=True))[:-1]:
        by_hand = []
        for choice in item.choices:
            found = logprobs(
                played.model, played.prompt_ids(item.prompt), played.tokenizer.encode(choice, add_special_tokens=False)
            )
            by_hand.append(sum(found) / (len(found) if task == "mean" else 1))
        assert values == pytest.approx(by_hand, abs=1e-3)
        best = by_hand.index(max(by_hand))
        assert (row.value, row.response) == (float(best == item.answer), item.choices[best])
    assert {row.value for row in rows} == {0.0, 1.0, None}


def test_perplexity_is_of_the_raw_text_and_cut_text_is_predicted_from_one_token_on(played: Played) -> None:
    size = ENGINE.max_model_len - 1
    for task, texts in (("lines", TEXTS), ("book", BOOK)):
        for text, row in zip(texts, played.in_order(task), strict=True):
            ids = played.tokenizer.encode(text, add_special_tokens=False)
            parts = [ids] if len(ids) <= size else [ids[:size], ids[size - 1 :]]
            nll = -sum(sum(logprobs(played.model, part[:1], part[1:])) for part in parts)
            assert row.weight == len(ids) - 1
            assert row.value == pytest.approx(nll, abs=1e-3)
    assert len(ids) < size < len(played.tokenizer.encode(TEXTS[3], add_special_tokens=False)) < 2 * size


def test_rows_are_sorted_and_counts_and_figures_are_recorded(played: Played) -> None:
    rows = list(read_capability(played.rows_dir))
    assert rows == sorted(rows, key=lambda row: (row.task, row.item_id))
    outcome = read_manifest(played.rows_dir).outcome
    parts = {tally.of: tally.parts for tally in outcome.tallies}
    assert parts["items of exact"] == {"right": 4, "wrong": 2, "unscored": 1}
    assert parts["items of lines"] == {"scored": 11, "unscored": 0}
    figures = outcome.metrics["tasks"]
    assert figures["exact"] == {"accuracy": 4 / 7, "num_items": 7, "num_unscored": 1}
    nll, weight = (math.fsum(of_row) for of_row in zip(*((r.value, r.weight) for r in played.in_order("book")), strict=True))
    assert figures["book"]["perplexity"] == pytest.approx(math.exp(nll / weight))
    assert outcome.metrics["canary"]["effect"] == pytest.approx(1, abs=1e-3)


def test_the_conditions_beside_the_rows_are_those_of_the_engine(played: Played, world: World) -> None:
    conditions = read_conditions(played.rows_dir)
    assert (conditions.policy_key, conditions.has_adapter) == (world.policy().key, True)
    assert conditions.canary == read_manifest(played.rows_dir).outcome.metrics["canary"]
    assert conditions.versions == engine_versions()
    assert conditions.engine == ENGINE.model_dump(mode="json", exclude={"canary_tolerance"})


def test_an_engine_that_serves_the_bare_base_is_stopped_before_it_is_asked(played: Played) -> None:
    complaint = json.loads((played.root / "seen.json").read_text())["bare"]
    assert complaint.startswith("the engine does not apply the policy's adapter")
    assert not (played.root / "bare").exists()
