"""A real sequence-classification model with random weights: batched scores are its scores, and order cannot matter."""

from __future__ import annotations

import asyncio
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from dpo_loop.artifacts import materialize
from dpo_loop.errors import InputError
from dpo_loop.exchange import read_ballots, read_judgements
from dpo_loop.types import Decided, Graded, Undecided, UndecidedReason
from judges.accounts import Accounts
from judges.backend import JudgeRequest, Reply
from judges.config import RewardModelJudge
from judges.reward_model import RewardModelBackend
from judges.stage import judge_stage
from judges.weights import weights_identity
from tests.builders import build_model
from tests.judges.world import make_prompt, write_answers, write_prompts

PROMPT = make_prompt("Say hello")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model's shape and tokenizer under a head with one output."""
    folder = tmp_path_factory.mktemp("reward") / "model"
    config = LlamaConfig.from_pretrained(build_model(folder))
    config.num_labels = 1
    torch.manual_seed(3)
    with torch.no_grad():
        head = LlamaForSequenceClassification(config)
        head.score.weight.normal_(0, 3)
    head.save_pretrained(folder)
    return folder


def ask(judge: RewardModelJudge, *pairs: tuple[str, str | None]) -> list[Reply]:
    async def run() -> list[Reply]:
        backend = RewardModelBackend(judge)
        return list(await asyncio.gather(*(backend.ask(JudgeRequest("k", PROMPT, left, right)) for left, right in pairs)))

    return asyncio.run(run())


def judge_of(model: Path, **settings: object) -> RewardModelJudge:
    return RewardModelJudge.model_validate({"kind": "reward_model", "model": str(model), **settings})


def reward(model: Path, text: str) -> float:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForSequenceClassification.from_pretrained(model).eval()
    network.config.pad_token_id = tokenizer.pad_token_id
    messages = [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": text}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False, return_tensors="pt")
    with torch.inference_mode():
        return float(network(input_ids=ids["input_ids"]).logits[0, 0])


def test_a_batch_gives_each_answer_the_score_that_it_has_alone(model: Path) -> None:
    texts = ["one", "one two three four five", "two", "hello " * 12]
    replies = ask(judge_of(model, batch_size=3), *((text, texts[0]) for text in texts[1:]), (texts[1], None))
    first = reward(model, texts[0])
    for text, reply in zip(texts[1:], replies, strict=False):
        assert isinstance(reply.outcome, Decided)
        assert reply.outcome.p_left == pytest.approx(1 / (1 + math.exp(first - reward(model, text))), abs=1e-5)
    assert isinstance(replies[-1].outcome, Graded)
    assert replies[-1].outcome.quality == pytest.approx(1 / (1 + math.exp(-reward(model, texts[1]))), abs=1e-5)


def test_the_other_order_is_the_other_answer(model: Path) -> None:
    one, other = (reply.outcome for reply in ask(judge_of(model), ("one", "two three"), ("two three", "one")))
    assert isinstance(one, Decided)
    assert isinstance(other, Decided)
    assert one.p_left + other.p_left == pytest.approx(1.0)
    assert one.p_left != 0.5


def test_an_answer_too_long_for_the_model_is_undecided(model: Path) -> None:
    [reply] = ask(judge_of(model, max_length=16), ("one", "word " * 200))
    assert isinstance(reply.outcome, Undecided)
    assert reply.outcome.reason is UndecidedReason.TRUNCATED


def test_a_stage_judges_with_it(model: Path, tmp_path: Path) -> None:
    prompts = [make_prompt(f"Say {number}") for number in range(5)]
    write_prompts(tmp_path / "prompts", prompts)
    write_answers(tmp_path / "generate", [(prompt, ["one", "two three", "four"]) for prompt in prompts])
    inputs = {"prompts": tmp_path / "prompts", "completions": tmp_path / "generate", "seed": 0}
    materialize(judge_stage(Accounts(tmp_path / "ledger.sqlite")), tmp_path / "judge", judge=judge_of(model), **inputs)
    assert all(judgement.verdict and judgement.verdict.winner_id for judgement in read_judgements(tmp_path / "judge"))
    assert all(isinstance(ballot.outcome, Decided) for ballot in read_ballots(tmp_path / "judge"))


def test_a_model_that_is_none_or_has_more_outputs_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded"):
        RewardModelBackend(judge_of(tmp_path))
    two = tmp_path / "two"
    network = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2, ignore_mismatched_sizes=True)
    network.save_pretrained(two)
    AutoTokenizer.from_pretrained(model).save_pretrained(two)
    with pytest.raises(InputError, match="has 2 outputs"):
        RewardModelBackend(judge_of(two))


def test_models_of_the_same_name_are_different_judges(model: Path, tmp_path: Path) -> None:
    retrained = tmp_path / model.name
    shutil.copytree(model, retrained)
    (retrained / "config.json").write_text((model / "config.json").read_text() + " ")
    names = [("alice/rm-8b", "c1"), ("bob/rm-8b", "c1"), ("alice/rm-8b", "c2"), ("alice/rm-8b", None), (str(model), None)]
    assert len({str(weights_identity(*name)) for name in [*names, (str(retrained), None)]}) == len(names) + 1
