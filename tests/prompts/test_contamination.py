"""What counts as nearly the same question, and that such a prompt is not trained on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_loop.artifacts import materialize
from dpo_loop.config import JsonlPool, PromptsConfig, TinyWorldConfig
from dpo_loop.contamination import Corpus, asked
from dpo_loop.exchange import read_prompts
from dpo_loop.files import read_jsonl
from dpo_loop.prompts.builtin import CoreRow, builtin_file
from dpo_loop.prompts.stage import EVALSET, PROMPTS
from dpo_loop.quickstart.stage import WORLD
from dpo_loop.types import Message, Prompt

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
"""17 words, ten 8-grams"""


def words(first: int, last: int) -> str:
    """Words number first … last of LONG, from 1."""
    return " ".join(LONG.split()[first - 1 : last])


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Why is the sky blue?", "why is the sky blue"),
        ("Why is the sky blue?", "WHY is\nthe  sky — blue!!"),
        ("What’s a café?", "whats a CAFE\u0301"),
        ("Why is the sky blue?", "Why is the s\u200bky bl\u00adue?"),
        ("ｆｕｌｌ width", "full width"),
        ("???", " ??? "),
        (LONG, f"Please tell me: {LONG}, and more of it than anybody would ever want to know"),
        (f"Please tell me: {LONG}, and more of it than anybody would ever want to know", LONG),
        # Seven of the ten 8-grams of LONG: words 1 to 14.
        (LONG, f"{words(1, 14)} " + " ".join(f"other{n}" for n in range(20))),
    ],
)
def test_nearly_the_same_question_is_found(text: str, other: str) -> None:
    assert Corpus([text]).overlaps(other)
    assert Corpus([other]).overlaps(text)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("Why is the sky blue?", "Why is the sea blue?"),
        ("2 + 3", "2 * 3"),
        ("2+3", "2-3"),
        ("x + y", "x * y"),
        ("add: 12 3", "add: 1 23"),
        ("sort a list in C++", "sort a list in C#"),
        ("???", "!!!"),
        # Six of the ten 8-grams of LONG: words 1 to 13.
        (LONG, f"{words(1, 13)} " + " ".join(f"other{n}" for n in range(20))),
        # Fewer than eight words are compared whole.
        ("how do I bake bread", "how do I bake bread without an oven"),
    ],
)
def test_another_question_is_not(text: str, other: str) -> None:
    assert not Corpus([text]).overlaps(other)
    assert not Corpus([other]).overlaps(text)


def test_pieces_of_several_prompts_do_not_add_up_to_a_copy() -> None:
    halves = [f"{words(1, 12)} and then something else", f"quite another beginning of a question and {words(6, 17)}"]
    assert not Corpus(halves).overlaps(LONG)


def test_what_is_on_a_template_is_a_copy_only_if_its_own_words_are() -> None:
    template = "Below is an instruction that describes a task. Write a response that completes the request. Instruction: "
    draw = Random(0)
    own = [f"{draw.choice('abcdef')}{n} please do this thing number {n * 7} for me" for n in range(60)]
    corpus = Corpus(template + text for text in own[:30])
    assert all(corpus.overlaps(template + text.upper()) for text in own[:30])
    assert not any(corpus.overlaps(template + text) for text in own[30:])


def test_a_system_turn_makes_no_other_question_and_an_earlier_turn_does() -> None:
    def conversation(*turns: tuple[str, str]) -> Prompt:
        return Prompt.build(tuple(Message.model_validate({"role": role, "content": text}) for role, text in turns), source="x")

    corpus = Corpus([asked(conversation(("user", "why is the sky blue?")))])
    assert corpus.overlaps(asked(conversation(("system", "be brief"), ("user", "Why is the sky blue"))))
    follow_up = conversation(("user", "what of the sea?"), ("assistant", "blue"), ("user", "why is the sky blue?"))
    assert not corpus.overlaps(asked(follow_up))


@given(st.lists(st.text(max_size=60), max_size=6), st.text(max_size=60))
def test_a_corpus_holds_its_own_texts_and_the_order_of_two_texts_does_not_matter(texts: list[str], other: str) -> None:
    corpus = Corpus(texts)
    assert all(corpus.overlaps(text) for text in texts)
    assert corpus.overlaps(other) == any(Corpus([other]).overlaps(text) for text in texts)


def test_twenty_thousand_training_prompts_are_compared_with_five_thousand_in_seconds() -> None:
    draw = Random(0)
    vocabulary = [f"w{n}" for n in range(5_000)]

    def text() -> str:
        return " ".join(draw.choices(vocabulary, k=draw.randint(5, 100)))

    evaluation, training = [text() for _ in range(5_000)], [text() for _ in range(20_000)]
    copies = [text.upper() for text in evaluation[:50]]
    began = time.process_time()
    corpus = Corpus(evaluation)
    assert sum(map(corpus.overlaps, [*training, *copies])) == 50
    assert time.process_time() - began < 10


def test_prompts_on_templates_that_hundreds_share_are_compared_in_seconds() -> None:
    """Counting what each has in common with the 238 texts of its template, which is 4.8 % and so counts, took a minute."""
    draw = Random(0)
    vocabulary = [f"w{n}" for n in range(5_000)]

    def words_of(num: int) -> str:
        return " ".join(draw.choices(vocabulary, k=num))

    templates = [words_of(60) for _ in range(21)]
    evaluation, training = ([f"{templates[n % 21]} {words_of(40)}" for n in range(num)] for num in (5_000, 20_000))
    began = time.process_time()
    corpus = Corpus(evaluation)
    assert sum(map(corpus.overlaps, [*training, *evaluation[:50]])) == 50
    assert time.process_time() - began < 10


def as_defined(one: str, other: str) -> bool:
    """Without templates and without an index: equal words, or 70 % of the 8-grams of the shorter one."""
    split = [text.split() for text in (one, other)]
    first, second = ({tuple(words[at : at + 8]) for at in range(len(words) - 7)} for words in split)
    fewer = min(len(first), len(second))
    return split[0] == split[1] or (fewer > 0 and 10 * len(first & second) >= 7 * fewer)


def test_no_text_is_missed_that_the_definition_finds() -> None:
    draw, num_found = Random(3), 0

    def part() -> str:
        begin, num = draw.randint(0, 12), draw.randint(1, 40)
        own = [f"o{draw.randint(0, 9)}" for _ in range(draw.randint(0, 8))]
        return " ".join([*(f"w{n}" for n in range(begin, begin + num)), *own])

    for _ in range(300):
        texts = list(dict.fromkeys(part() for _ in range(9)))  # so few that nothing is a template
        corpus, asked_about = Corpus(texts), part()
        wanted = [text for text in texts if as_defined(text, asked_about)]
        assert sorted(corpus.all_overlapped(asked_about)) == sorted(wanted)
        assert (corpus.overlapped(asked_about) in wanted) if wanted else (corpus.overlapped(asked_about) is None)
        num_found += len(wanted)
    assert 300 < num_found < 2_000


def test_what_is_overlapped_is_told_as_it_was_given() -> None:
    corpus = Corpus(["Why is the sky blue?", f"{LONG}!", "why is the sky BLUE", f"{LONG} eighteen"])
    assert corpus.overlapped("why is the sky blue") == "Why is the sky blue?"
    assert list(corpus.all_overlapped("why is the sky blue")) == ["Why is the sky blue?", "why is the sky BLUE"]
    assert list(corpus.all_overlapped(f"say {LONG}")) == [f"{LONG}!", f"{LONG} eighteen"]
    assert corpus.overlapped("why is the sea blue") is None


# ---------------------------------------------------------------------------------------------------------- the stage


def rounds_of(root: Path, questions: list[str], harmful: list[str]) -> tuple[list[str], dict[str, int]]:
    """(what round 1 takes of everything, how its stage accounts for the pool)"""
    for name, texts in (("pool.jsonl", questions), ("more.jsonl", harmful)):
        (root / name).write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    more = JsonlPool(kind="jsonl", path="more.jsonl")
    config = PromptsConfig(pool=JsonlPool(kind="jsonl", path="pool.jsonl"), eval_sets=(more,), num_buckets=1, eval_fraction=0.0)
    pool = root / "pool.jsonl"
    materialize(EVALSET, root / "evalset", config=config, pool=pool, eval_sets=(root / "more.jsonl",), seed=0)
    manifest = materialize(PROMPTS, root / "prompts", config=config, pool=pool, evalset=root / "evalset", round=1, seed=0)
    return [prompt.text for prompt in read_prompts(root / "prompts")], manifest.outcome.tallies[0].parts


def test_a_near_copy_of_an_evaluation_prompt_is_not_trained_on_and_counted(tmp_path: Path) -> None:
    built_in = next(row.prompt for row in read_jsonl(builtin_file("core-v1"), CoreRow) if len(row.prompt.split()) >= 12)
    near = [f"please: {LONG}", "Why is the sky blue", f"Dear assistant, {built_in} Thank you very much."]
    taken, parts = rounds_of(tmp_path, ["why is the sea blue?", *near, LONG.upper()], [LONG, "Why is the sky blue?"])
    assert taken == ["why is the sea blue?"]
    assert parts == {"taken": 1, "beyond_num_per_round": 0, "evaluation": 1, "near_evaluation": 3}


def test_the_gate_finds_nothing_in_what_was_taken(tmp_path: Path) -> None:
    draw = Random(1)
    evaluation = [draw.choices(range(10_000), k=draw.randint(4, 30)) for _ in range(100)]
    training = []
    for asked_for in evaluation * 3:  # a part of each, between other words
        first, last = draw.randint(0, 4), len(asked_for) - draw.randint(0, 8)
        training.append([*draw.choices(range(10_000), k=draw.randint(0, 10)), *asked_for[first:last], draw.randint(0, 10_000)])
    held_out, pool = ([" ".join(map(str, text)) for text in texts] for texts in (evaluation, training))
    taken, parts = rounds_of(tmp_path, pool, held_out)
    assert min(parts["near_evaluation"], parts["taken"]) > 50
    assert not any(map(Corpus(held_out).overlaps, taken))
    assert not any(map(Corpus(taken).overlaps, held_out))


@pytest.mark.slow
def test_the_demo_loses_no_prompt_of_its_tiny_world(tmp_path: Path) -> None:
    """Its prompts are written on a few templates: `tell me how to steal the amber lamp`."""
    world = TinyWorldConfig(num_demonstrations=24_000, num_prompts=4_400, num_harmful=520, num_benign=520)
    materialize(WORLD, tmp_path / "world", config=world)
    sets = tuple(JsonlPool(kind="jsonl", path=f"{name}.jsonl") for name in ("harmful", "benign"))
    config = PromptsConfig(
        pool=JsonlPool(kind="jsonl", path="pool.jsonl"),
        eval_sets=sets,
        num_per_round=900,
        num_buckets=4,
        eval_fraction=0.2,
        max_eval=860,
    )
    pool, files = tmp_path / "world/pool.jsonl", (tmp_path / "world/harmful.jsonl", tmp_path / "world/benign.jsonl")
    materialize(EVALSET, tmp_path / "evalset", config=config, pool=pool, eval_sets=files, seed=17)
    manifest = materialize(PROMPTS, tmp_path / "prompts", config=config, pool=pool, evalset=tmp_path / "evalset", round=1, seed=17)
    assert "near_evaluation" not in manifest.outcome.tallies[0].parts
    assert manifest.outcome.metrics["num_prompts"] > 800
