"""GENERATE and ANSWER on the real vLLM, played in child processes (conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_loop.artifacts import read_manifest
from dpo_loop.exchange import DROPPED, read_completions, read_prompts
from dpo_loop.types import FinishReason
from tests.generation.conftest import logprobs
from tests.generation.worlds import GENERATION, NUM_PROMPTS, NUM_SHARDS, World

pytestmark = pytest.mark.slow

END = 0
"""<|end|> of the builders' tokenizer."""


def _files(stage_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in stage_dir.glob("*.jsonl")}


def _complaint(world: World, scenario: str) -> str:
    """What an error said in the child `scenarios`."""
    return json.loads((world.root / "seen.json").read_text())[scenario]


def test_a_stage_killed_after_its_first_shard_goes_on_from_there_and_ends_byte_identical(played: World, killed: int) -> None:
    assert 1 <= killed < NUM_SHARDS
    resumed, whole = read_manifest(played.rounds / "killed"), read_manifest(played.rounds / "whole")
    assert resumed.outcome.metrics["num_shards_resumed"] == killed
    assert whole.outcome.metrics["num_shards_resumed"] == 0
    assert _files(played.rounds / "killed") == _files(played.rounds / "whole")
    assert len(_files(played.rounds / "whole")) == NUM_SHARDS + 1


def test_another_run_seed_samples_other_answers(played: World) -> None:
    one = [c.token_ids for c in read_completions(played.rounds / "whole")]
    other = [c.token_ids for c in read_completions(played.rounds / "other_seed")]
    assert sum(a == b for a, b in zip(one, other, strict=True)) < len(one) / 10


def test_completions_come_by_prompt_then_k_each_with_its_own_seed(played: World) -> None:
    prompts = [p.id for p in read_prompts(played.prompts)]
    dropped = {json.loads(line)["prompt_id"] for line in (played.rounds / "whole" / DROPPED).read_text().splitlines()}
    completions = list(read_completions(played.rounds / "whole"))
    wanted = [(p, k) for p in prompts if p not in dropped for k in range(GENERATION.k)]
    assert [(c.prompt_id, c.k) for c in completions] == wanted
    assert len({c.seed for c in completions}) == len(completions) == len({c.id for c in completions})
    assert len({c.token_ids for c in completions}) > 0.9 * len(completions)
    assert {c.policy_key for c in completions} == {played.policy().key}


def test_prompt_ids_are_the_chat_templates_and_text_is_what_the_sampled_ids_say(played: World) -> None:
    tokenizer = AutoTokenizer.from_pretrained(played.base)
    prompts = {p.id: p for p in read_prompts(played.prompts)}
    for completion in read_completions(played.rounds / "whole"):
        rendered = "".join(f"<|{m.role}|>{m.content}<|end|>" for m in prompts[completion.prompt_id].messages) + "<|assistant|>"
        assert tokenizer.decode(completion.prompt_token_ids) == rendered
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)


def test_the_end_of_turn_token_is_kept_iff_the_model_stopped_by_itself(played: World) -> None:
    completions = list(read_completions(played.rounds / "whole"))
    assert {c.finish_reason for c in completions} == {FinishReason.STOP, FinishReason.LENGTH}
    for completion in completions:
        assert completion.token_ids.count(END) == (completion.finish_reason is FinishReason.STOP)
        assert (completion.token_ids[-1] == END) == (completion.finish_reason is FinishReason.STOP)
        if completion.finish_reason is FinishReason.LENGTH:
            assert len(completion.token_ids) == GENERATION.max_new_tokens


def test_log_probs_are_the_adapters_at_temperature_one_though_sampled_at_another(played: World) -> None:
    base = AutoModelForCausalLM.from_pretrained(played.base, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, played.adapter).eval()
    for completion in list(read_completions(played.rounds / "whole"))[::11]:
        prompt, sampled = list(completion.prompt_token_ids), list(completion.token_ids)
        assert completion.logprob == pytest.approx(sum(logprobs(model, prompt, sampled)), abs=1e-3)
        with model.disable_adapter():
            assert abs(completion.logprob - sum(logprobs(model, prompt, sampled))) > 1e-2


def test_a_prompt_that_leaves_no_room_for_the_answer_is_dropped_and_counted(played: World) -> None:
    manifest = read_manifest(played.rounds / "whole")
    assert manifest.outcome.tallies[0].parts == {"generated": NUM_PROMPTS, "prompt_too_long": 1}
    (row,) = [json.loads(line) for line in (played.rounds / "whole" / DROPPED).read_text().splitlines()]
    assert row["reason"] == "prompt_too_long"
    assert row["num_tokens"] > row["max_tokens"] == GENERATION.engine.max_model_len - GENERATION.max_new_tokens
    assert row["prompt_id"] == list(read_prompts(played.prompts))[3].id


def test_the_manifest_tells_how_it_went(played: World) -> None:
    metrics = read_manifest(played.rounds / "whole").outcome.metrics
    completions = list(read_completions(played.rounds / "whole"))
    assert metrics["num_completions"] == len(completions) == NUM_PROMPTS * GENERATION.k
    assert metrics["mean_tokens"] == pytest.approx(sum(len(c.token_ids) for c in completions) / len(completions))
    truncated = sum(c.finish_reason is FinishReason.LENGTH for c in completions)
    assert metrics["truncated_share"] == pytest.approx(truncated / len(completions))
    assert metrics["tokens_per_s"] > 0
    assert metrics["engine_start_s"] > 0


def test_the_canary_passes_for_the_adapter_that_is_served(played: World) -> None:
    canary = read_manifest(played.rounds / "whole").outcome.metrics["canary"]
    assert canary["distance"] < 1e-4
    assert canary["base_distance"] < 1e-4
    assert canary["effect"] == pytest.approx(1, abs=1e-3)


def test_the_canary_stops_an_engine_that_does_not_apply_the_adapter(played: World) -> None:
    complaint = _complaint(played, "not_applied")
    assert complaint.startswith("CanaryError: the engine does not apply the policy's adapter")
    assert "adapter effect 0.000 of 1" in complaint


def test_the_canary_stops_an_engine_that_serves_another_adapter(played: World) -> None:
    complaint = _complaint(played, "other_adapter")
    assert complaint.startswith("CanaryError: the engine does not serve this policy: mean |engine - transformers+peft|")
    assert "the tolerance is 0.05" in complaint


def test_a_context_longer_than_the_models_is_refused_with_vllms_reason(played: World) -> None:
    complaint = _complaint(played, "too_long_context")
    assert complaint.startswith(f"PolicyError: vLLM cannot serve the policy at {played.adapter}")
    assert "max_model_len" in complaint


def test_an_adapter_of_the_head_is_refused_because_no_canary_can_show_it(played: World) -> None:
    assert _complaint(played, "adapted_head").startswith(f"PolicyError: {played.head_adapter} adapts lm_head; vLLM leaves that out")


def test_a_bare_base_answers_greedily_after_its_own_canary(played: World) -> None:
    manifest = read_manifest(played.rounds / "answer")
    assert manifest.outcome.metrics["canary"]["distance"] < 1e-4
    assert manifest.outcome.metrics["canary"]["effect"] is None
    completions = list(read_completions(played.rounds / "answer"))
    assert len(completions) == NUM_PROMPTS
    assert {c.k for c in completions} == {0}
    model = AutoModelForCausalLM.from_pretrained(played.base, dtype=torch.float32).eval()
    for completion in completions[::7]:
        prompt = torch.tensor([completion.prompt_token_ids])
        greedy = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False)
        assert list(completion.token_ids) == greedy[0, prompt.shape[1] :].tolist()
