"""pairs.jsonl is a conversational preference dataset as TRL knows it, and TRL tokenises it to the ids that were sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dpo_loop.artifacts import materialize
from dpo_loop.config import PairingConfig
from dpo_loop.exchange import JUDGEMENTS, PAIRS, PROMPTS, completions_file, read_pairs
from dpo_loop.files import write_jsonl
from dpo_loop.pairing.stage import PAIR
from dpo_loop.types import Completion, FinishReason, Message, Prompt, PromptJudgement, Verdict, VerdictKind
from tests.builders import build_model

TEXTS = [("two words", "two"), ("ÅÄÖ 😀 — “quoted”", "line\nbreak\t{}"), ("count to five", "1 2 3 4 5")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair stage whose token ids come from the model's own tokenizer and chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    run = tmp_path_factory.mktemp("run")
    prompts, completions, judgements = [], [], []
    for number, texts in enumerate(TEXTS):
        turns = (Message(role="system", content="Be brief."), Message(role="user", content=f"Say {number}"))
        prompt = Prompt.build(turns[number % 2 :], source="t")
        messages = [turn.model_dump() for turn in prompt.messages]
        prompt_ids = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        made = [
            Completion(
                id=f"{number}-{k}",
                prompt_id=prompt.id,
                k=k,
                text=text,
                prompt_token_ids=prompt_ids,
                token_ids=(*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id),
                finish_reason=FinishReason.STOP,
                logprob=-1.0,
                policy_key="p",
                seed=k,
            )
            for k, text in enumerate(texts)
        ]
        verdict = Verdict(
            prompt_id=prompt.id,
            a_id=made[0].id,
            b_id=made[1].id,
            kind=VerdictKind.WINNER,
            p_a=float(number % 2),
            winner_id=made[1 - number % 2].id,
            margin=1.0,
            ballot_keys=("k1", "k2"),
        )
        prompts.append(prompt)
        completions += made
        judgements.append(PromptJudgement(prompt_id=prompt.id, best_id=made[0].id, worst_id=made[1].id, verdict=verdict))
    for name in ("prompts", "generate", "judge"):
        (run / name).mkdir()
    write_jsonl(run / "prompts" / PROMPTS, prompts)
    write_jsonl(run / "generate" / completions_file(0), completions)
    write_jsonl(run / "judge" / JUDGEMENTS, judgements)
    inputs = {"prompts": run / "prompts", "completions": run / "generate", "judgements": run / "judge"}
    materialize(PAIR, run / "pair", config=PairingConfig(max_length_ratio=100.0), **inputs)
    return run / "pair"


@pytest.fixture(scope="module")
def dataset(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    from datasets import load_dataset

    cache = str(tmp_path_factory.mktemp("cache"))
    return load_dataset("json", data_files=str(pairs / PAIRS), split="train", cache_dir=cache)


def test_datasets_reads_every_column_of_every_pair(pairs: Path, dataset: Any) -> None:
    written = [pair.model_dump(mode="json") for pair in read_pairs(pairs)]
    assert [dict(row) for row in dataset] == written
    assert len(written) == len(TEXTS)


def test_trl_takes_it_for_a_conversational_preference_dataset(pairs: Path, dataset: Any) -> None:
    from transformers import AutoTokenizer
    from trl import is_conversational, maybe_apply_chat_template
    from trl.data_utils import maybe_extract_prompt

    from tests.builders import build_tokenizer

    build_tokenizer(pairs.parent / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(pairs.parent / "tokenizer")
    for row in dataset:
        assert is_conversational(row)
        assert maybe_extract_prompt(dict(row))["prompt"] == row["prompt"], "the prompt is explicit, nothing is guessed"
        texts = maybe_apply_chat_template({name: row[name] for name in ("prompt", "chosen", "rejected")}, tokenizer)
        assert texts["prompt"].endswith("<|assistant|>")
        assert texts["chosen"] == row["chosen"][0]["content"] + "<|end|>"
        assert texts["rejected"] == row["rejected"][0]["content"] + "<|end|>"


@pytest.mark.slow
def test_the_dpo_trainer_of_trl_tokenises_it_to_the_sampled_ids(model: Path, dataset: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        args=DPOConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=None),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    rows = list(trainer.train_dataset)
    assert len(rows) == len(TEXTS)
    for row, pair in zip(rows, dataset, strict=True):
        assert row["prompt_ids"] == pair["prompt_token_ids"]
        assert row["chosen_ids"] == pair["chosen_token_ids"]
        assert row["rejected_ids"] == pair["rejected_token_ids"]
