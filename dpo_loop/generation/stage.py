"""Stages `generate` (K samples a prompt, for pairs) and `answer` (one answer a prompt, for evaluation).

Both render the prompts once with the policy's chat template, prove with the canary that the engine serves the policy, and write
`completions-00000.jsonl` … by prompt as in prompts.jsonl, then by k. Prompts that leave no room for the answer are dropped and counted.
The seed of a sample is a hash of what it is (run, round, prompt, k), so it does not depend on shards, engines or restarts.
Shards that are finished are kept when the stage is killed, for as long as it goes on with the same versions of the engine's packages.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpo_loop.artifacts import Stage, scratch
from dpo_loop.config import AnswerConfig, EngineConfig, GenerationConfig
from dpo_loop.errors import ConfigError
from dpo_loop.exchange import CONDITIONS, DROPPED, PROMPT_TOO_LONG, read_prompts
from dpo_loop.files import write_json, write_jsonl, write_text
from dpo_loop.generation.canary import read_canary
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.conditions import conditions_of, engine_versions, folder_made_with
from dpo_loop.generation.engine import Answer, Ask, OpenEngine, Sampling, open_engine, prepare_environment
from dpo_loop.generation.proof import check_policy, prove
from dpo_loop.generation.shards import ShardFigures, Shards
from dpo_loop.progress import say
from dpo_loop.types import Completion, PolicyRef, Prompt, StageOutcome, Tally, content_id

ANSWER_SHARD_SIZE = 256


def generate(
    out: Path,
    *,
    prompts: Path,
    policy: PolicyRef,
    config: GenerationConfig,
    run_id: str,
    round: int,
    seed: int,
    start: OpenEngine = open_engine,
) -> StageOutcome:
    """K sampled completions a prompt. start: how an engine is had; a caller that keeps one running gives its own."""

    def seed_of(prompt: Prompt, k: int) -> int:
        return _seed(seed, run_id, round, prompt.id, k)

    sampling = Sampling(temperature=config.temperature, top_p=config.top_p, max_new_tokens=config.max_new_tokens)
    return _play(
        out,
        prompts=prompts,
        policy=policy,
        engine_config=config.engine,
        sampling=sampling,
        k=config.k,
        shard_size=config.shard_size,
        seed_of=seed_of,
        start=start,
        name="generate",
        section="generation",
        too_long_means="they are left out",
        versions=engine_versions(),
    )


def answer(
    out: Path,
    *,
    prompts: Path,
    policy: PolicyRef,
    engine: EngineConfig,
    config: AnswerConfig,
    seed: int,
    again: bool = False,
    start: OpenEngine = open_engine,
) -> StageOutcome:
    """One answer a prompt; its seed depends on the prompt alone, so candidate, previous and anchor draw the same noise.

    again: other noise and other batches, which show how far two evaluations of one policy differ (A/A).
    """

    def seed_of(prompt: Prompt, k: int) -> int:  # noqa: ARG001 - one sample a prompt
        return _seed("answer again" if again else "answer", seed, prompt.id)

    sampling = Sampling(temperature=config.temperature, top_p=1.0, max_new_tokens=config.max_new_tokens)
    versions = engine_versions()
    outcome = _play(
        out,
        prompts=prompts,
        policy=policy,
        engine_config=engine,
        sampling=sampling,
        k=1,
        shard_size=ANSWER_SHARD_SIZE,
        seed_of=seed_of,
        start=start,
        name="answer",
        section="answering",
        too_long_means="they count as ungraded, and above gate.max_unscored every round will be INVALID",
        backwards=again,
        versions=versions,
    )
    conditions = conditions_of(
        policy,
        asked=(prompt.id for prompt in read_prompts(prompts)),
        template_sha256=Chat(policy).template_sha256,
        decoding=asdict(sampling),
        # The canary's tolerance does not change an answer.
        engine=engine.model_dump(mode="json", exclude={"canary_tolerance"}),
        canary=outcome.metrics["canary"],
        versions=versions,
    )
    write_json(out / CONDITIONS, conditions)
    return outcome


GENERATE = Stage("generate", 1, generate)
ANSWER = Stage("answer", 2, answer)


def _play(
    out: Path,
    *,
    prompts: Path,
    policy: PolicyRef,
    engine_config: EngineConfig,
    sampling: Sampling,
    k: int,
    shard_size: int,
    seed_of: Callable[[Prompt, int], int],
    start: OpenEngine,
    name: str,
    section: str,
    too_long_means: str,
    versions: Mapping[str, str],
    backwards: bool = False,
) -> StageOutcome:
    """name: opens the progress lines. section: of the config, for messages; too_long_means: what becomes of a prompt that is too long. backwards: the
    last prompt first. versions: of the engine's packages. Raises ConfigError, PolicyError before an engine starts, CanaryError before it generates."""
    limit = engine_config.max_model_len - sampling.max_new_tokens
    if limit < 1:
        raise ConfigError(
            [
                f"{section}.max_new_tokens: {sampling.max_new_tokens} leaves no room for a prompt in generation.engine.max_model_len {engine_config.max_model_len}"
            ]
        )
    check_policy(policy, engine_config)
    canary = read_canary(policy)
    prepare_environment()
    chat = Chat(policy)
    rendered = [(prompt, chat.prompt_ids(prompt)) for prompt in read_prompts(prompts)]
    if backwards:
        rendered.reverse()
    kept = [(prompt, ids) for prompt, ids in rendered if len(ids) <= limit]
    dropped = [
        {"prompt_id": prompt.id, "reason": PROMPT_TOO_LONG, "num_tokens": len(ids), "max_tokens": limit}
        for prompt, ids in rendered
        if len(ids) > limit
    ]
    if dropped:
        say(f"{name}: {_too_long(len(dropped), len(rendered), limit)}; {too_long_means}")
    slices = [kept[begin : begin + shard_size] for begin in range(0, len(kept), shard_size)]
    folder = scratch(out) / "shards"
    if difference := folder_made_with(versions, folder):
        say(f"{name}: what was finished before is made anew, since it was made with other versions: {difference}")
    proof = folder / "proof.json"
    metrics: dict[str, Any] = {"engine_start_s": None}
    with closing(Shards(folder)) as shards:
        todo = [index for index in range(len(slices)) if index not in shards.finished]
        metrics["num_shards_resumed"] = len(slices) - len(todo)
        if todo:
            say(f"{name}: starting the engine; {len(todo)} of {len(slices)} shards, {len(kept)} prompts in all")
            engine = start(policy, engine_config)
            say(f"{name}: engine ready after {engine.start_s:.1f} s")
            metrics["engine_start_s"] = round(engine.start_s, 2)
            write_text(proof, json.dumps(prove(name, engine, canary, engine_config)))
        for index in todo:
            began = time.monotonic()
            wanted = [(prompt, ids, sample, seed_of(prompt, sample)) for prompt, ids in slices[index] for sample in range(k)]
            answers = engine.sample([Ask(prompt_token_ids=ids, seed=seed) for _, ids, _, seed in wanted], sampling, stage=name)
            seconds = time.monotonic() - began
            completions = [
                _completion(prompt, ids, sample, seed, answer, policy_key=policy.key, text=chat.text(answer.token_ids))
                for (prompt, ids, sample, seed), answer in zip(wanted, answers, strict=True)
            ]
            shards.finish(index, completions, seconds=seconds)
            say(f"{name}: {_progress(list(shards.finished.values()), len(kept))}")
        shards.publish(out)
        metrics["canary"] = json.loads(proof.read_text()) if proof.is_file() else None
        metrics |= _metrics(list(shards.finished.values()))
    write_jsonl(out / DROPPED, dropped)
    parts = {"generated": len(kept), PROMPT_TOO_LONG: len(dropped)}
    return StageOutcome(tallies=(Tally(of="prompts", total=len(rendered), parts=parts),), metrics=metrics)


def _too_long(num_dropped: int, num_prompts: int, limit: int) -> str:
    return (
        f"WARNING: {num_dropped} of {num_prompts} prompts have more than the {limit} tokens that generation.engine.max_model_len "
        "leaves them beside the answer"
    )


def _completion(
    prompt: Prompt, prompt_token_ids: tuple[int, ...], k: int, seed: int, answer: Answer, *, policy_key: str, text: str
) -> Completion:
    return Completion(
        id=content_id("completion", policy_key, prompt.id, k, seed, list(answer.token_ids)),
        prompt_id=prompt.id,
        k=k,
        text=text,
        prompt_token_ids=prompt_token_ids,
        token_ids=answer.token_ids,
        finish_reason=answer.finish_reason,
        logprob=answer.logprob,
        policy_key=policy_key,
        seed=seed,
    )


def _progress(done: Sequence[ShardFigures], num_prompts: int) -> str:
    last = done[-1]  # in this process: shards of an earlier one come first
    return (
        f"{sum(s.num_prompts for s in done)}/{num_prompts} prompts, {sum(s.num_completions for s in done)} completions, "
        f"{last.num_tokens / max(last.seconds, 1e-9):.0f} tok/s"
    )


def _metrics(done: Sequence[ShardFigures]) -> dict[str, Any]:
    """tokens_per_s: sampled tokens over the time in the engine, start and canary left out."""
    completions, tokens = sum(s.num_completions for s in done), sum(s.num_tokens for s in done)
    seconds = sum(s.seconds for s in done)
    return {
        "num_completions": completions,
        "truncated_share": sum(s.num_truncated for s in done) / completions if completions else None,
        "mean_tokens": tokens / completions if completions else None,
        "mean_logprob_per_token": sum(s.logprob for s in done) / tokens if tokens else None,
        "tokens_per_s": round(tokens / seconds, 1) if seconds else None,
        "sample_s": round(seconds, 2),
    }


def _seed(*parts: Any) -> int:
    """31 bits: torch generators and every engine take them."""
    return int(content_id(*parts), 16) & 0x7FFFFFFF
