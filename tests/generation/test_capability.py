"""The stage `capability`: its local tasks on the real vLLM against transformers by hand, and what it makes of bad files and bad items."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import Stage, fingerprint, materialize, read_manifest
from dpo_loop.config import CapabilityConfig, CapabilityTask, EngineConfig, ExactMatchTask, MultipleChoiceTask, PerplexityTask
from dpo_loop.errors import InputError
from dpo_loop.exchange import CAPABILITY as ROWS_FILE
from dpo_loop.exchange import read_capability
from dpo_loop.files import write_jsonl
from dpo_loop.generation.capability import measure
from dpo_loop.generation.engine import Answer
from dpo_loop.generation.items import read_items
from dpo_loop.generation.local_tasks import windows
from dpo_loop.policies import describe_policy
from dpo_loop.types import CapabilityRow, FinishReason, PolicyRef
from tests.generation.conftest import logprobs
from tests.generation.play_capability import CONFIG, MAX_NEW_TOKENS
from tests.generation.worlds import ENGINE, World

TEXTS = [
    "say the words",
    "count to five in upper case, then say it",
    "é and ü\nin two lines",
    "say the words and count to five. " * 30,
]
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
    (root / "book.txt").write_text("\n\n" + "\n  \n\n".join(TEXTS[:3]) + "\r\n")
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


@pytest.mark.slow
def test_exact_match_is_of_the_whole_greedy_answer_without_the_white_space_around_it(played: Played) -> None:
    rows = played.in_order("exact")
    assert [row.value for row in rows] == [1.0, 0.0, 1.0, 0.0, 1.0, 1.0, None]
    assert [row.response for row in rows[:6]] == [played.greedy(f"count to {n}") for n in range(6)]
    assert [row.value for row in played.in_order("folded")] == [1.0, 0.0, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.slow
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


@pytest.mark.slow
def test_perplexity_is_of_the_raw_text_and_cut_text_is_predicted_from_one_token_on(played: Played) -> None:
    size = ENGINE.max_model_len - 1
    for task, texts in (("lines", TEXTS), ("book", TEXTS[:3])):
        for text, row in zip(texts, played.in_order(task), strict=True):
            ids = played.tokenizer.encode(text, add_special_tokens=False)
            parts = [ids] if len(ids) <= size else [ids[:size], ids[size - 1 :]]
            nll = -sum(sum(logprobs(played.model, part[:1], part[1:])) for part in parts)
            assert row.weight == len(ids) - 1
            assert row.value == pytest.approx(nll, abs=1e-3)
    assert len(ids) < size < len(played.tokenizer.encode(TEXTS[3], add_special_tokens=False)) < 2 * size


@pytest.mark.slow
def test_rows_are_sorted_and_counts_and_figures_are_recorded(played: Played) -> None:
    rows = list(read_capability(played.rows_dir))
    assert rows == sorted(rows, key=lambda row: (row.task, row.item_id))
    outcome = read_manifest(played.rows_dir).outcome
    parts = {tally.of: tally.parts for tally in outcome.tallies}
    assert parts["items of exact"] == {"right": 4, "wrong": 2, "unscored": 1}
    assert parts["items of lines"] == {"scored": 4, "unscored": 0}
    figures = outcome.metrics["tasks"]
    assert figures["exact"] == {"accuracy": 4 / 7, "num_items": 7, "num_unscored": 1}
    nll, weight = (math.fsum(of_row) for of_row in zip(*((r.value, r.weight) for r in played.in_order("book")), strict=True))
    assert figures["book"]["perplexity"] == pytest.approx(math.exp(nll / weight))
    assert outcome.metrics["canary"]["effect"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_an_engine_that_serves_the_bare_base_is_stopped_before_it_is_asked(played: Played) -> None:
    complaint = json.loads((played.root / "seen.json").read_text())["bare"]
    assert complaint.startswith("the engine does not apply the policy's adapter")
    assert not (played.root / "bare").exists()


# ---------------------------------------------------------------------------------------------------- without an engine


class Even:
    """An engine that finds every token equally likely, but one that it makes `odd` of, and answers with nothing."""

    start_s = 0.0

    def __init__(self, *, odd: float = -1.0, fails_at_score: bool = False) -> None:
        self._odd, self._fails, self.num_sampled = odd, fails_at_score, 0

    def sample(self, asks: list[object], sampling: object, *, stage: str) -> list[Answer]:
        self.num_sampled += len(asks)
        return [Answer(token_ids=(0,), finish_reason=FinishReason.STOP, logprob=-1.0) for _ in asks]

    def score(self, sequences: list[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        if self._fails:
            raise RuntimeError("out of memory")
        return [[-1.0] * (len(ids) - 2) + [self._odd] for ids in sequences]


def exact(path: Path) -> ExactMatchTask:
    return ExactMatchTask(kind="exact_match", id="exact", path=str(path))


def choice(path: Path, *, normalised: bool = True) -> MultipleChoiceTask:
    return MultipleChoiceTask(kind="multiple_choice", id="choice", path=str(path), length_normalised=normalised)


def text(path: Path) -> PerplexityTask:
    return PerplexityTask(kind="perplexity", id="text", path=str(path))


def play(world: World, out: Path, engine: Even, *tasks: CapabilityTask) -> dict[str, list[CapabilityRow]]:
    def start(policy: PolicyRef, config: EngineConfig) -> Even:
        return engine

    stage = Stage("capability", 1, partial(measure, start=start))
    files = tuple(Path(task.path) for task in tasks)
    policy = describe_policy(world.base)
    materialize(stage, out, policy=policy, engine=ENGINE, config=CapabilityConfig(tasks=tasks), files=files, seed=0)
    rows = list(read_capability(out))
    return {task.id: [row for row in rows if row.task == task.id] for task in tasks}


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_tie_between_choices_is_wrong(world: World, tmp_path: Path) -> None:
    file = write(tmp_path / "choices.jsonl", {"prompt": "which?", "choices": ["five", "count to five"], "answer": 0})
    [row] = play(world, tmp_path / "mean", Even(), choice(file))["choice"]
    assert (row.value, row.response) == (0.0, "five = count to five")
    [row] = play(world, tmp_path / "sum", Even(), choice(file, normalised=False))["choice"]
    assert (row.value, row.response) == (1.0, "five")


@pytest.mark.parametrize("odd", [math.nan, -math.inf])
def test_a_log_prob_that_is_no_number_leaves_its_item_unscored_and_counted(world: World, tmp_path: Path, odd: float) -> None:
    choices = write(tmp_path / "choices.jsonl", {"prompt": "which?", "choices": ["five", "six"], "answer": 0})
    texts = write(tmp_path / "texts.jsonl", {"text": "say the words"}, {"text": "x"})
    rows = play(world, tmp_path / "out", Even(odd=odd), choice(choices), text(texts))
    assert [row.value for of_task in rows.values() for row in of_task] == [None] * 3
    outcome = read_manifest(tmp_path / "out").outcome
    assert [tally.parts["unscored"] for tally in outcome.tallies] == [1, 2]
    assert outcome.metrics["tasks"]["text"] == {"perplexity": None, "num_items": 2, "num_unscored": 2}


def test_a_finished_task_is_kept_when_the_stage_dies(world: World, tmp_path: Path) -> None:
    answers = write(tmp_path / "exact.jsonl", {"prompt": "say", "answer": "it"})
    texts = write(tmp_path / "texts.jsonl", {"text": "say the words"})
    with pytest.raises(RuntimeError, match="out of memory"):
        play(world, tmp_path / "out", Even(fails_at_score=True), exact(answers), text(texts))
    engine = Even()
    rows = play(world, tmp_path / "out", engine, exact(answers), text(texts))
    assert engine.num_sampled == 0
    assert ([row.value for row in rows["exact"]], len(rows["text"])) == ([0.0], 1)


def test_all_bad_lines_of_all_files_are_listed_by_number(world: World, tmp_path: Path) -> None:
    good = {"prompt": "say", "answer": "it"}
    answers = write(
        tmp_path / "exact.jsonl",
        good,
        {"prompt": "say"},
        {"answer": "it"},
        good,
        {"prompt": "p", "answer": []},
        {"prompt": " ", "answer": "a"},
    )
    answers.write_text(answers.read_text() + '{"prompt": \n')
    options = {"prompt": "which?", "choices": ["a", "b"]}
    choices = write(
        tmp_path / "choices.jsonl",
        {**options, "answer": 2},
        {**options, "answer": True},
        {**options, "choices": ["a", "a"], "answer": 0},
        {"messages": [{"role": "assistant", "content": "hm"}], "choices": ["a", "b"], "answer": 0},
    )
    texts = write(tmp_path / "texts.jsonl", {"text": " "}, {"words": "x"})
    latin = tmp_path / "latin.txt"
    latin.write_bytes("one\n\nf\xfcnf".encode("latin-1"))
    empty = write(tmp_path / "empty.jsonl")
    tasks = (exact(answers), choice(choices), text(texts), *(text(f).model_copy(update={"id": f.stem}) for f in (latin, empty)))
    with pytest.raises(InputError) as caught:
        play(world, tmp_path / "out", Even(), *tasks)
    said = [line.strip().replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()[1:]]
    for line, begin in zip(
        said,
        (
            "exact.jsonl:2: answer: Field required",
            'exact.jsonl:3: wanted {"prompt": "..."} or {"messages": [...]}',
            "exact.jsonl:4: the same as line 1",
            "exact.jsonl:5: there is no accepted answer, or an empty one",
            "exact.jsonl:6: the conversation must end with a user turn, and no turn may be empty",
            "exact.jsonl:7: Invalid JSON",
            "choices.jsonl:1: answer 2 is none of the 2 choices; they are counted from 0",
            "choices.jsonl:2: answer: Input should be a valid integer",
            "choices.jsonl:3: a choice is empty, or there twice",
            "choices.jsonl:4: the conversation must end with a user turn",
            "texts.jsonl:1: a text without a word",
            "texts.jsonl:2: text: Field required",
            "latin.txt:3: not UTF-8",
            "empty.jsonl:1: the file holds no item",
        ),
        strict=True,
    ):
        assert line.startswith(begin)


def test_windows_predict_every_token_but_the_first_once() -> None:
    for num in range(1, 40):
        parts = windows(tuple(range(num)), 8)
        assert [token for part in parts for token in part[1:]] == list(range(1, num))
        assert all(len(part) <= 8 for part in parts)


def test_no_tasks_make_an_empty_file_without_an_engine(world: World, tmp_path: Path) -> None:
    materialize(
        Stage("capability", 1, partial(measure, start=lambda policy, config: pytest.fail("an engine was started"))),
        tmp_path / "out",
        policy=describe_policy(world.base),
        engine=ENGINE,
        config=CapabilityConfig(),
        files=(),
        seed=0,
    )
    assert (tmp_path / "out" / ROWS_FILE).read_text() == ""


def test_where_a_tasks_file_lies_is_not_in_the_key_and_its_content_is(tmp_path: Path) -> None:
    here, there = (
        write(tmp_path / "a.jsonl", {"prompt": "p", "answer": "a"}),
        write(tmp_path / "b.jsonl", {"prompt": "p", "answer": "a"}),
    )
    assert fingerprint(exact(here)) == fingerprint(exact(there))
    assert fingerprint((here,)) == fingerprint((there,))
    write(there, {"prompt": "p", "answer": "b"})
    assert fingerprint((here,)) != fingerprint((there,))


def test_tasks_share_no_id() -> None:
    with pytest.raises(ValueError, match="share the id exact"):
        CapabilityConfig(tasks=(exact(Path("a")), exact(Path("b"))))
