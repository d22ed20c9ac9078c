"""The seed stage: a model as it is, or one fine-tuned on demonstrations."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_loop.training.loop.step_lines
from dpo_loop.artifacts import materialize
from dpo_loop.config import LoraShape, ModelStart, OptimizerConfig, SftConfig, SftStart, Start
from dpo_loop.errors import InputError, PolicyError
from dpo_loop.exchange import CANARY, METRICS
from dpo_loop.policies import adapter_problems, base_name, model_problems, read_policy
from dpo_loop.training.seed import SEED
from dpo_loop.types import PolicyRef, StageManifest
from flows.progress import is_progress
from tests.builders import build_adapter, build_model
from tests.training.test_stage import plain_difference, rows

WORDS = ("say", "the", "words", "count", "five", "upper", "case")


def demonstration(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty questions whose answer is their last word."""
    path = tmp_path_factory.mktemp("demonstrations") / "demonstrations.jsonl"
    lines = [demonstration(f"say {one} {two}", two) for one in WORDS for two in WORDS] + [demonstration("say", "x" * 300)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def sft_start(**changes: object) -> SftStart:
    sft = {"optimizer": OptimizerConfig(lr=3e-3), "epochs": 6, "examples_per_step": 10, "dtype": "float32", "max_length": 64}
    return SftStart(kind="sft", model="m", demonstrations="d", sft=SftConfig.model_validate(sft | changes))


def seed(
    run: Path, start: Start, model: Path | None, *, adapter: Path | None = None, demonstrations: Path | None = None
) -> StageManifest:
    out = run / "rounds" / "000" / "seed"
    out.parent.mkdir(parents=True)
    return materialize(SEED, out, start=start, model=model, adapter=adapter, demonstrations=demonstrations)


def test_sft_on_all_weights_publishes_a_whole_model_that_learned(tmp_path: Path, base: PolicyRef, demonstrations: Path) -> None:
    manifest = seed(tmp_path, sft_start(), Path(base.base), demonstrations=demonstrations)
    out = tmp_path / "rounds/000/seed"
    assert manifest.outcome.tallies[0].parts == {"trained": 49, "too_long": 1}
    metrics = rows(out / METRICS)
    assert [row["step"] for row in metrics] == list(range(1, 31))
    assert metrics[-1]["loss"] < metrics[0]["loss"] / 2
    policy = read_policy(out)
    assert (policy.base, policy.adapter) == (str(out / "model"), None)
    assert model_problems(Path(policy.base)) == []
    assert policy.base_sha256 != base.base_sha256
    template = AutoTokenizer.from_pretrained(policy.base).chat_template
    assert template == AutoTokenizer.from_pretrained(base.base).chat_template
    canary = json.loads((out / CANARY).read_text())
    assert (canary["base_sha256"], canary["adapter_sha256"]) == (policy.base_sha256, None)
    assert {row["base_logprobs"] for row in canary["sequences"]} == {None}
    assert max(plain_difference(row, policy.base, None, "policy_logprobs") for row in canary["sequences"]) < 1e-5


def test_every_progress_line_is_one_that_the_command_line_shows(
    tmp_path: Path, base: PolicyRef, demonstrations: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpo_loop.training.loop.step_lines, "SAY_EVERY_S", 0.0)
    seed(tmp_path, sft_start(epochs=1), Path(base.base), demonstrations=demonstrations)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not is_progress("seed", line)] == []
    assert re.fullmatch(r"seed: sft step 1/5, loss \d\.\d+, \d+ tok/s, \d+ s left", lines[1])
    assert len(lines) == 1 + 5


def test_sft_with_lora_publishes_an_adapter_over_the_same_base(tmp_path: Path, base: PolicyRef, demonstrations: Path) -> None:
    start = sft_start(lora=LoraShape(rank=8, alpha=16), epochs=1)
    seed(tmp_path, start, Path(base.base), demonstrations=demonstrations)
    policy = read_policy(tmp_path / "rounds/000/seed")
    assert (policy.base, policy.base_sha256) == (base.base, base.base_sha256)
    assert adapter_problems(Path(policy.adapter), Path(base.base)) == []
    (row, *_) = json.loads((tmp_path / "rounds/000/seed" / CANARY).read_text())["sequences"]
    assert plain_difference(row, policy.base, policy.adapter, "policy_logprobs") < 1e-5
    assert plain_difference(row, policy.base, None, "base_logprobs") < 1e-5


@pytest.mark.parametrize("lora", [None, LoraShape(rank=4, alpha=8)])
@pytest.mark.parametrize("train_on", ["last_turn", "all_turns"])
def test_packed_and_padded_sft_have_the_same_losses(tmp_path: Path, base: PolicyRef, lora: LoraShape | None, train_on: str) -> None:
    """With conversations of two turns; packed rows are recomputed in the backward pass, padded ones are not."""
    talks = [
        demonstration(f"say {one}", one)["messages"] + demonstration(f"count {two}", two)["messages"]
        for one in WORDS
        for two in WORDS
    ]
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    curves, packed = {}, {}
    for forward in ("auto", "padded"):
        start = sft_start(epochs=1, lora=lora, train_on=train_on, forward=forward, gradient_checkpointing=forward == "auto")
        manifest = seed(tmp_path / forward, start, Path(base.base), demonstrations=path)
        packed[forward] = manifest.outcome.metrics["packed"]
        curves[forward] = [row["loss"] for row in rows(tmp_path / forward / "rounds/000/seed" / METRICS)]
    assert packed == {"auto": True, "padded": False}
    assert curves["auto"] == pytest.approx(curves["padded"], rel=1e-4)
    assert curves["auto"][-1] < curves["auto"][0]


def test_demonstrations_with_tokens_that_the_model_does_not_know_are_refused(
    tmp_path: Path, base: PolicyRef, demonstrations: Path
) -> None:
    """A tokenizer with added tokens beside a model whose embeddings were not resized."""
    model = build_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<|new{number}|>" for number in range(60)])
    tokenizer.save_pretrained(model)
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(demonstration("count", answer)) + "\n" for answer in ("x" * 300, "<|new59|>")))
    with pytest.raises(InputError, match=r"new\.jsonl:2: token id \d+ in its completion is not in the model's vocabulary of 320"):
        seed(tmp_path, sft_start(), model, demonstrations=path)


def test_memory_that_runs_out_while_a_model_is_loaded_is_explained(
    tmp_path: Path, base: PolicyRef, demonstrations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocator's own error, asked for a petabyte."""
    monkeypatch.setattr("dpo_loop.training.seed.load_base", lambda *_, **__: torch.empty(1 << 50, dtype=torch.uint8))
    with pytest.raises(InputError, match=r"supervised fine-tuning does not fit into memory .*allocate memory.* a smaller base"):
        seed(tmp_path, sft_start(), Path(base.base), demonstrations=demonstrations)


def test_a_model_is_taken_as_it_is_with_a_canary_of_everyday_text(tmp_path: Path, base: PolicyRef) -> None:
    adapter = build_adapter(tmp_path / "adapter", Path(base.base))
    seed(tmp_path, ModelStart(kind="model", model="m", adapter="a"), Path(base.base), adapter=adapter)
    policy = read_policy(tmp_path / "rounds/000/seed")
    assert (policy.base, policy.adapter) == (base.base, str(adapter))
    canary = json.loads((tmp_path / "rounds/000/seed" / CANARY).read_text())
    assert len(canary["sequences"]) == 8
    assert plain_difference(canary["sequences"][3], base.base, str(adapter), "policy_logprobs") < 1e-5


def test_weights_are_saved_in_the_dtype_they_came_in(tmp_path: Path, base: PolicyRef, demonstrations: Path) -> None:
    half = build_model(tmp_path / "half")
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    seed(tmp_path, sft_start(epochs=1), half, demonstrations=demonstrations)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "rounds/000/seed/model").dtype == torch.bfloat16


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    model = build_model(tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    with pytest.raises(PolicyError, match="chat template"):
        seed(tmp_path, ModelStart(kind="model", model="m"), model)


def test_a_name_that_is_neither_a_directory_nor_a_hub_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="neither a directory nor a model"):
        seed(tmp_path, ModelStart(kind="model", model="no/such/model/anywhere"), None)


@pytest.mark.slow
def test_a_hub_id_is_taken_from_the_hubs_cache_and_its_commit_recorded(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its environment once, and no test goes to the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--someone--tiny"
    build_model(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    (tmp_path / "rounds/000").mkdir(parents=True)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", TAKE_FROM_HUB, str(tmp_path)], cwd=Path(__file__).parents[2], env=environment, check=True)
    policy = read_policy(tmp_path / "rounds/000/seed")
    assert (Path(policy.base), policy.revision) == (repo / "snapshots" / commit, commit)
    assert base_name(policy.base) == "someone/tiny"


TAKE_FROM_HUB = """
import sys
from pathlib import Path
from dpo_loop.artifacts import materialize
from dpo_loop.config import ModelStart
from dpo_loop.training.seed import SEED

out = Path(sys.argv[1]) / "rounds/000/seed"
materialize(SEED, out, start=ModelStart(kind="model", model="someone/tiny"), model=None, adapter=None, demonstrations=None)
"""
