"""What generation refuses by name before an engine is started, and the parts of it that need none."""

from __future__ import annotations

import json
import math
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dpo_loop.artifacts import Stage, materialize
from dpo_loop.config import EngineConfig
from dpo_loop.errors import CanaryError, ConfigError, PolicyError
from dpo_loop.exchange import read_prompts
from dpo_loop.files import write_json
from dpo_loop.generation.canary import Canary, CanarySequence, check_canary
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.engine import Engine
from dpo_loop.generation.lines import ProgressLines
from dpo_loop.generation.shards import Shards
from dpo_loop.generation.stage import answer, generate
from dpo_loop.policies import describe_policy
from dpo_loop.types import Completion, FinishReason, PolicyRef
from tests.builders import build_adapter, build_model
from tests.generation.worlds import ANSWERING, ENGINE, NUM_PROMPTS, World


def _no_engine(policy: PolicyRef, config: EngineConfig) -> Engine:
    raise AssertionError("an engine was started")


def _refusal(world: World, out: Path, kind: type[Exception], **changed: object) -> str:
    with pytest.raises(kind) as caught:
        generate(out, **{**world.generate_inputs(), "start": _no_engine, **changed})
    return str(caught.value)


def test_a_rank_above_the_engines_maximum_is_named(world: World, tmp_path: Path) -> None:
    adapter = build_adapter(tmp_path / "wide", world.base, rank=16)
    said = _refusal(world, tmp_path, PolicyError, policy=describe_policy(world.base, adapter=adapter))
    assert "rank 16, above the engine's max_lora_rank 8; raise generation.engine.max_lora_rank" in said


def test_an_adapter_of_another_base_is_named(world: World, tmp_path: Path) -> None:
    other = describe_policy(build_model(tmp_path / "other_base", seed=5))
    write_json(world.adapter / "dpo_loop.json", {"base_sha256": other.base_sha256})
    try:
        policy = other.model_copy(update={"adapter": str(world.adapter), "base": str(world.base), "base_sha256": "0" * 64})
        said = _refusal(world, tmp_path, PolicyError, policy=policy)
    finally:
        (world.adapter / "dpo_loop.json").unlink()
    assert "was trained on another base" in said


def test_an_adapter_that_changed_since_it_was_described_is_named(world: World, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(world.adapter, adapter)
    policy = describe_policy(world.base, adapter=adapter)
    shutil.copyfile(world.other_adapter / "adapter_model.safetensors", adapter / "adapter_model.safetensors")
    assert "its sha256 differs" in _refusal(world, tmp_path, PolicyError, policy=policy)


def test_an_incomplete_base_is_named(world: World, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(world.base, base)
    policy = describe_policy(base)
    (base / "model.safetensors").unlink()
    assert "has no *.safetensors weights" in _refusal(world, tmp_path, PolicyError, policy=policy)


def test_an_adapter_without_a_canary_is_not_served(world: World, tmp_path: Path) -> None:
    said = _refusal(world, tmp_path, PolicyError, policy=world.policy().model_copy(update={"canary": None}))
    assert "has an adapter but no canary.json" in said


def test_the_canary_of_another_policy_proves_nothing(world: World, tmp_path: Path) -> None:
    said = _refusal(world, tmp_path, PolicyError, policy=world.policy().model_copy(update={"canary": str(world.other_canary)}))
    assert "was made for another policy" in said


def test_an_answer_as_long_as_the_context_leaves_no_room_for_a_prompt(world: World, tmp_path: Path) -> None:
    config = world.generate_inputs()["config"].model_copy(update={"max_new_tokens": 256})
    said = _refusal(world, tmp_path, ConfigError, config=config)
    assert "generation.max_new_tokens: 256 leaves no room for a prompt in generation.engine.max_model_len 256" in said


def test_a_template_that_doubles_the_bos_is_refused(world: World, tmp_path: Path) -> None:
    prompt = next(read_prompts(world.prompts))
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.bos_token = "<|pad|>"
    for begin, doubled in (("{{ bos_token }}", False), ("{{ bos_token }}{{ bos_token }}", True)):
        template = AutoTokenizer.from_pretrained(world.base).chat_template
        tokenizer.chat_template = begin + template
        tokenizer.save_pretrained(tmp_path)
        chat = Chat(PolicyRef(base=str(tmp_path), base_sha256="0"))
        if doubled:
            with pytest.raises(PolicyError, match="two BOS tokens"):
                chat.prompt_ids(prompt)
        else:
            assert chat.prompt_ids(prompt)[:2] == (tokenizer.bos_token_id, tokenizer.convert_tokens_to_ids("<|system|>"))


def test_a_template_that_refuses_a_prompt_is_quoted(world: World, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    tokenizer.chat_template = "{{ raise_exception('no user turns here') }}"
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(PolicyError, match=r"cannot render prompt .*: no user turns here"):
        Chat(PolicyRef(base=str(tmp_path), base_sha256="0")).prompt_ids(next(read_prompts(world.prompts)))


# ------------------------------------------------------------------------------------------------------------------ shards


def _completion(prompt_id: str) -> Completion:
    return Completion(
        id=f"c-{prompt_id}",
        prompt_id=prompt_id,
        k=0,
        text="é",
        prompt_token_ids=(3,),
        token_ids=(7, 0),
        finish_reason=FinishReason.STOP,
        logprob=-1.25,
        policy_key="p",
        seed=1,
    )


@pytest.mark.parametrize("damage", ["torn", "missing", "journal torn"])
def test_a_shard_that_is_not_whole_is_done_again(tmp_path: Path, damage: str) -> None:
    shards = Shards(tmp_path)
    shards.finish(0, [_completion("a")], seconds=1.0)
    shards.finish(1, [_completion("b")], seconds=1.0)
    shards.close()
    second = tmp_path / "completions-00001.jsonl"
    match damage:
        case "torn":
            second.write_bytes(second.read_bytes()[:-9])
        case "missing":
            second.unlink()
        case "journal torn":
            journal = tmp_path / "shards.jsonl"
            journal.write_bytes(journal.read_bytes()[:-9])
    again = Shards(tmp_path)
    assert sorted(again.finished) == [0]
    again.finish(1, [_completion("b")], seconds=1.0)
    again.close()
    whole = Shards(tmp_path)
    assert sorted(whole.finished) == [0, 1]
    whole.close()


def test_evaluation_prompts_that_are_too_long_are_warned_of_when_round_zero_answers_them(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = describe_policy(world.base)
    tight = ENGINE.model_copy(update={"max_model_len": ANSWERING.max_new_tokens + 50})
    out = tmp_path / "answer"
    inputs = {"prompts": world.prompts, "policy": policy, "engine": tight, "config": ANSWERING, "seed": 7}
    manifest = materialize(Stage("answer", 1, partial(answer, start=_no_engine)), out, **inputs)
    assert manifest.outcome.tallies[0].parts == {"generated": 0, "prompt_too_long": NUM_PROMPTS + 1}
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(
        "answer: WARNING: 23 of 23 prompts have more than the 50 tokens that generation.engine.max_model_len leaves"
    )
    assert line.endswith("above gate.max_unscored every round will be INVALID")


def test_a_long_shard_shows_progress_that_the_command_line_takes_for_the_stages_own(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(
        total=1_200, desc="Processed prompts", dynamic_ncols=True, postfix="output: 412.00 toks/s", stage="generate"
    )
    lines.last_print_t = lines.start_t = lines.start_t - 60.0  # a minute in
    lines.update(512)
    lines.close()
    assert capsys.readouterr().out == "generate: 512/1200 completions of this shard, output: 412.00 toks/s\n"


# ------------------------------------------------------------------------------------------------------------------ canary


class Serving:
    """An engine whose log-probs are base + share * (policy - base) + noise, tokens in canary order."""

    start_s = 0.0

    def __init__(self, canary: Canary, *, share: float, noise: float, bare: float = 0.0) -> None:
        """bare: is added to what it says without the adapter."""
        self._canary, self._share, self._random, self._noise, self._bare = canary, share, random.Random(0), noise, bare

    def sample(self, asks: object, sampling: object, *, stage: str) -> list[object]:
        raise AssertionError("something was generated")

    def score(self, sequences: list[tuple[int, ...]], *, with_adapter: bool) -> list[list[float]]:
        share = self._share if with_adapter else 0.0
        rows = []
        for s, ids in zip(self._canary.sequences, sequences, strict=True):
            assert ids == (*s.prompt_token_ids, *s.token_ids)
            moved = 0.0 if with_adapter else self._bare
            served = [b + share * (p - b) + moved for p, b in zip(s.policy_logprobs, s.base_logprobs, strict=True)]
            before = [math.nan] * (len(s.prompt_token_ids) - 1)
            rows.append(before + [x + self._random.gauss(0, self._noise) for x in served])
        return rows


def _canary(difference: float) -> Canary:
    """Four sequences of 16 tokens on which policy and base differ by about `difference` nats."""
    draw = random.Random(1)
    sequences = []
    for _ in range(4):
        base = [-draw.expovariate(0.5) for _ in range(16)]
        policy = tuple(b + draw.gauss(0, difference) for b in base)
        sequences.append(
            CanarySequence(
                prompt_token_ids=(3, 4, 5), token_ids=tuple(range(6, 22)), policy_logprobs=policy, base_logprobs=tuple(base)
            )
        )
    return Canary(base_sha256="b", adapter_sha256="a", sequences=tuple(sequences))


@given(difference=st.floats(1e-3, 1.0), noise=st.sampled_from([1e-7, 1e-5, 1e-4]))
def test_an_adapter_far_smaller_than_the_tolerance_is_still_missed_when_it_is_not_applied(difference: float, noise: float) -> None:
    canary = _canary(difference)
    applied = check_canary(Serving(canary, share=1.0, noise=noise), canary, tolerance=0.05, max_tokens=64)
    if applied.effect is not None:
        assert applied.effect == pytest.approx(1, abs=0.25)
        with pytest.raises(CanaryError, match="does not apply the policy's adapter"):
            check_canary(Serving(canary, share=0.0, noise=noise), canary, tolerance=0.05, max_tokens=64)
    assert applied.effect is not None or difference < 20 * noise


def test_an_effect_that_drowns_in_the_engines_noise_is_not_judged() -> None:
    canary = _canary(1e-4)
    assert check_canary(Serving(canary, share=0.0, noise=1e-2), canary, tolerance=0.05, max_tokens=64).effect is None


def test_numerics_beyond_the_tolerance_stop_the_round_with_the_figures() -> None:
    canary = _canary(0.5)
    with pytest.raises(CanaryError, match=r"nats over 64 tokens.*the tolerance is 0\.05"):
        check_canary(Serving(canary, share=1.0, noise=0.2), canary, tolerance=0.05, max_tokens=64)


def test_a_log_prob_that_is_not_a_number_does_not_pass() -> None:
    canary = _canary(0.5)
    with pytest.raises(CanaryError, match="nan nats"):
        check_canary(Serving(canary, share=1.0, noise=math.nan), canary, tolerance=1e9, max_tokens=64)


@pytest.mark.parametrize("bare", [math.nan, math.inf, -math.inf])
def test_an_effect_that_is_not_a_number_does_not_pass(bare: float) -> None:
    """No comparison with NaN is true, so that `effect < 1/2` let it through; and an infinite noise hid it."""
    canary = _canary(0.5)
    with pytest.raises(CanaryError, match=r"log-probs that are no numbers.*adapter effect nan of 1"):
        check_canary(Serving(canary, share=1.0, noise=0.0, bare=bare), canary, tolerance=0.05, max_tokens=64)


def test_a_canary_file_whose_base_is_not_a_number_proves_nothing() -> None:
    right = _canary(0.5)
    broken = right.sequences[0].model_copy(update={"base_logprobs": (math.nan, *right.sequences[0].base_logprobs[1:])})
    canary = right.model_copy(update={"sequences": (broken, *right.sequences[1:])})
    with pytest.raises(CanaryError, match=r"or canary\.json holds them"):
        check_canary(Serving(right, share=1.0, noise=0.0), canary, tolerance=0.05, max_tokens=64)


def test_a_canary_longer_than_the_context_proves_nothing() -> None:
    canary = _canary(0.5)
    with pytest.raises(CanaryError, match=r"none of the 4 canary sequences has at most 18 tokens.*Raise engine\.max_model_len"):
        check_canary(Serving(canary, share=1.0, noise=0.0), canary, tolerance=0.05, max_tokens=18)


def test_the_canary_file_has_the_agreed_fields(world: World) -> None:
    assert set(json.loads(world.canary.read_text())) == set(Canary.model_fields)
