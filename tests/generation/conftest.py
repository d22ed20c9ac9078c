"""One small world, and the stages played in it once, in child processes as in production: an engine start costs ten seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dpo_loop.files import write_json, write_jsonl
from dpo_loop.policies import describe_policy
from dpo_loop.types import Message, Prompt
from tests.builders import build_adapter, build_model
from tests.generation.worlds import NUM_PROMPTS, World


def _canary(world: World, path: Path, adapter: Path | None) -> None:
    """Log-probs by transformers+peft, fp32, of eight random sequences: what the training room writes beside a policy."""
    policy = describe_policy(world.base, adapter=adapter)
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    rows = []
    for seed in range(8):
        ids = torch.randint(5, 320, (20 + seed,), generator=torch.Generator().manual_seed(seed))
        prompt, completion = ids[: 6 + seed].tolist(), ids[6 + seed :].tolist()
        row = {"prompt_token_ids": prompt, "token_ids": completion, "policy_logprobs": logprobs(model, prompt, completion)}
        if adapter is None:
            row["base_logprobs"] = None
        else:
            with model.disable_adapter():
                row["base_logprobs"] = logprobs(model, prompt, completion)
        rows.append(row)
    hashes = {"base_sha256": policy.base_sha256, "adapter_sha256": policy.adapter_sha256, "tolerance_hint": 0.05}
    write_json(path, {**hashes, "sequences": rows})


def logprobs(model: torch.nn.Module, prompt: list[int], completion: list[int]) -> list[float]:
    """Of each completion token given all before it, at temperature 1."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0]
    return logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("generation"))
    world.rounds.mkdir()
    build_model(world.base)
    build_adapter(world.adapter, world.base)
    build_adapter(world.other_adapter, world.base, seed=2)
    head = LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), head).save_pretrained(
        world.head_adapter, save_embedding_layers=False
    )
    _canary(world, world.canary, world.adapter)
    _canary(world, world.other_canary, world.other_adapter)
    _canary(world, world.base_canary, None)
    texts = [f"count to {number} and say it in upper case" for number in range(NUM_PROMPTS)]
    texts.insert(3, "say the words " * 40)
    world.prompts.mkdir()
    # Longer than a block of vLLM's prefix cache (128 tokens), so that prompts share one.
    rules = Message(role="system", content="say the words in upper case and count to five. " * 12)
    prompts = [Prompt.build((rules, Message(role="user", content=text)), source="test") for text in texts]
    write_jsonl(world.prompts / "prompts.jsonl", prompts)
    return world


def _start(world: World, part: str) -> subprocess.Popen[bytes]:
    with (world.root / f"{part}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.generation.child", str(world.root), part],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def _log(world: World, part: str) -> str:
    return (world.root / f"{part}.log").read_text()


@pytest.fixture(scope="session")
def killed(world: World) -> int:
    """GENERATE killed with SIGKILL after its first shard was durable, ANSWER beside it. Returns how many shards had been finished."""
    victim, answer = _start(world, "victim"), _start(world, "answer")
    journal = world.rounds / ".killed.scratch" / "shards" / "shards.jsonl"
    try:
        while victim.poll() is None and not (journal.exists() and journal.read_bytes().count(b"\n")):
            time.sleep(0.005)
        assert victim.poll() is None, _log(world, "victim")
        os.killpg(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        assert answer.wait() == 0, _log(world, "answer")
    finally:
        for process in (victim, answer):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return journal.read_bytes().count(b"\n")


@pytest.fixture(scope="session")
def played(world: World, killed: int) -> World:
    """The world after everything has been played; see child.py."""
    child = _start(world, "scenarios")
    try:
        assert child.wait() == 0, _log(world, "scenarios")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return world
