from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dpo_loop.artifacts import materialize, read_manifest
from dpo_loop.config import JsonlPool
from dpo_loop.errors import InputError
from dpo_loop.policies import model_problems
from dpo_loop.prompts.pool import read_pool
from dpo_loop.quickstart.families import WORDS, draw_task, read_task
from dpo_loop.quickstart.parts import Part, draw_unique, owner
from dpo_loop.quickstart.safety import Request, draw_harmful, read_request
from dpo_loop.quickstart.stage import WORLD
from dpo_loop.quickstart.tokenizer import END, SPECIAL, learn_tokenizer
from dpo_loop.quickstart.verifier import score
from dpo_loop.types import Message, Prompt, Side
from tests.quickstart.conftest import SMALL


def demonstrations(world: Path) -> list[tuple[Prompt, str]]:
    """(prompt, reply)"""
    rows = [json.loads(line)["messages"] for line in (world / "demonstrations.jsonl").read_text().splitlines()]
    return [(Prompt.build((Message(**asked),), source="test"), reply["content"]) for asked, reply in rows]


def prompts(world: Path, name: str) -> list[Prompt]:
    return list(read_pool(JsonlPool(kind="jsonl", path=name), world / name, skip_bad=False).prompts)


def key(prompt: Prompt) -> str:
    """What is asked, without the wording; a twin has its sibling's."""
    asked = read_task(prompt.text) or read_request(prompt.text)
    assert asked is not None
    return asked.key


def test_no_question_is_in_two_parts_of_the_world(world: Path) -> None:
    shown = {key(prompt) for prompt, _ in demonstrations(world)}
    pool = {key(prompt) for prompt in prompts(world, "pool.jsonl")}
    evaluated = {key(prompt) for name in ("harmful.jsonl", "benign.jsonl") for prompt in prompts(world, name)}
    assert len(evaluated) == 60
    assert not shown & pool
    assert not shown & evaluated
    assert not pool & evaluated


def test_the_files_hold_what_the_config_asks_for(world: Path) -> None:
    pool = prompts(world, "pool.jsonl")
    assert [sum(prompt.side is side for prompt in pool) for side in Side] == [350, 75, 75]
    assert {prompt.side for prompt in prompts(world, "harmful.jsonl")} == {Side.HARMFUL}
    assert {prompt.side for prompt in prompts(world, "benign.jsonl")} == {Side.BENIGN}
    assert len(prompts(world, "harmful.jsonl")) == 60
    assert len(prompts(world, "benign.jsonl")) == 40


def test_the_share_of_wrong_demonstrations_is_the_configured_one_on_every_side(world: Path) -> None:
    shown = demonstrations(world)
    wrong = [prompt for prompt, reply in shown if score(prompt, reply) == 0.0]
    assert len(shown) == 1_000
    assert len(wrong) == 300
    complied = [prompt for prompt in wrong if (asked := read_request(prompt.text)) and asked.side is Side.HARMFUL]
    refused = [prompt for prompt in wrong if (asked := read_request(prompt.text)) and asked.side is Side.BENIGN]
    assert 20 < len(complied) < 75
    assert 20 < len(refused) < 75


def test_one_seed_makes_the_same_bytes_again_and_another_seed_other_ones(world: Path, tmp_path: Path) -> None:
    again = materialize(WORLD, tmp_path / "again", config=SMALL)
    other = materialize(WORLD, tmp_path / "other", config=SMALL.model_copy(update={"seed": 6}))
    first = read_manifest(world)
    assert first is not None
    assert again.files == first.files
    for name in ("demonstrations.jsonl", "pool.jsonl", "harmful.jsonl", "model/model.safetensors"):
        assert other.files[name] != first.files[name]


def test_the_model_is_an_ordinary_transformers_directory(world: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    directory = world / "model"
    assert model_problems(directory) == []
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    assert 2_500_000 < model.num_parameters() < 4_000_000
    assert model.config.head_dim in (32, 64, 128)
    assert tokenizer.eos_token_id == model.config.eos_token_id == GenerationConfig.from_pretrained(directory).eos_token_id == 0
    turns = [{"role": "user", "content": "say: fox owl"}, {"role": "assistant", "content": "fox owl"}]
    asked = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template(turns)["input_ids"]
    assert whole[: len(asked)] == asked
    assert whole[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(whole[len(asked) : -1]) == "fox owl"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = Random(0)
    return learn_tokenizer([text for _ in range(2_000) for text in (draw_task(rng).text, draw_harmful(rng).text)])


@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer: Tokenizer, text: str) -> None:
    if not any(special in text for special in SPECIAL):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_word_of_the_world_is_one_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(" fox owl amber").tokens == ["Ġfox", "Ġowl", "Ġamber"]
    assert tokenizer.token_to_id(END) == 0


@given(st.integers(min_value=0, max_value=10**9))
def test_another_wording_and_the_twin_have_the_same_owner(seed: int) -> None:
    harmful = draw_harmful(Random(seed))
    assert owner(harmful.key, seed=1) is owner(harmful.twin.key, seed=1)


def test_a_world_that_is_too_small_says_so() -> None:
    rng = Random(0)

    def draw_one_of_few() -> Request:
        return Request(opening="how do i", verb="steal", thing=f"amber {rng.choice(WORDS)}")

    with pytest.raises(InputError, match=r"only \d+ distinct prompts for pool, not the 5000"):
        draw_unique(draw_one_of_few, 5_000, part=Part.POOL, seed=0)
