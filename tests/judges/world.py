"""A small round on disk for the judge, pair and grade stages, and verifiers as a user would write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo_loop.exchange import PROMPTS, completions_file
from dpo_loop.files import write_jsonl
from dpo_loop.types import Completion, FinishReason, Message, Prompt, content_id

VERIFIER = "tests.judges.world:shortest_wins"


def shortest_wins(prompt: Prompt, text: str) -> float:
    return 1 / (1 + len(text))


def num_a(prompt: Prompt, text: str) -> float:
    """Share of the letter a, in tenths: answers to the same prompt are often tied."""
    return min(10, text.count("a")) / 10


def passes_if_it_says_yes(prompt: Prompt, text: str) -> float:
    return 1.0 if "yes" in text else 0.999


def refuses_if_it_says_no(prompt: Prompt, text: str) -> str | None:
    return {"no": "refusal", "well": "partial", "ok": "compliance"}.get(text)


def cannot_tell(prompt: Prompt, text: str) -> None:
    return None


def returns_nonsense(prompt: Prompt, text: str) -> float:
    return float("nan")


def returns_a_word(prompt: Prompt, text: str) -> str:
    return "good"


def raises(prompt: Prompt, text: str) -> float:
    return 1 / 0


not_a_function = 3


def make_prompt(text: str, **tags: str) -> Prompt:
    return Prompt.build((Message(role="user", content=text),), source="test", tags=tags)


def make_completion(
    prompt: Prompt, k: int, text: str, *, policy: str = "p", finish: FinishReason = FinishReason.STOP
) -> Completion:
    token_ids = (*(10 + byte for byte in text.encode()), *((0,) if finish is FinishReason.STOP else ()))
    return Completion(
        id=content_id(prompt.id, k, text, policy),
        prompt_id=prompt.id,
        k=k,
        text=text,
        prompt_token_ids=(3, *(10 + byte for byte in prompt.text.encode()), 4),
        token_ids=token_ids,
        finish_reason=finish,
        logprob=-1.0 * len(token_ids),
        policy_key=policy,
        seed=k,
    )


def write_prompts(out: Path, prompts: Sequence[Prompt]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / PROMPTS, prompts)
    return out


def write_answers(
    out: Path, answers: Mapping[Prompt, Sequence[str]] | Sequence[tuple[Prompt, Sequence[str]]], *, policy: str = "p"
) -> Path:
    """Completions of each prompt, in two shards."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = list(answers.items()) if isinstance(answers, Mapping) else list(answers)
    half = (len(pairs) + 1) // 2
    for shard, part in enumerate((pairs[:half], pairs[half:])):
        rows = [make_completion(prompt, k, text, policy=policy) for prompt, texts in part for k, text in enumerate(texts)]
        write_jsonl(out / completions_file(shard), rows)
    return out
