"""Local capability tasks on a running engine: items in, a CapabilityRow each. Nothing is sampled, so no seed matters.

value None: the item does not fit into the engine's context, or a log-prob is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, assert_never

from dpo_loop.config import EngineConfig, ExactMatchTask, LocalTask, MultipleChoiceTask, PerplexityTask
from dpo_loop.generation.chat import Chat
from dpo_loop.generation.engine import Ask, Engine, Sampling
from dpo_loop.generation.items import Document, ExactMatchItem, MultipleChoiceItem
from dpo_loop.types import CapabilityRow

SCORE_BATCH = 256
"""Sequences an engine scores in one call: vLLM keeps a Python object per token of a call."""


def run_local_task(task: LocalTask, items: Sequence[Any], engine: Engine, chat: Chat, config: EngineConfig) -> list[CapabilityRow]:
    """A row per item, in order. items: of the kind that read_items gives for this task."""
    match task:
        case ExactMatchTask():
            return _exact_match(task, items, engine, chat, config)
        case MultipleChoiceTask():
            return _multiple_choice(task, items, engine, chat, config)
        case PerplexityTask():
            return _perplexity(task, items, engine, chat, config)
        case _:
            assert_never(task)


def _exact_match(
    task: ExactMatchTask, items: Sequence[ExactMatchItem], engine: Engine, chat: Chat, config: EngineConfig
) -> list[CapabilityRow]:
    def folded(text: str) -> str:
        return text.strip().casefold() if task.casefold else text.strip()

    prompts = {item.id: chat.prompt_ids(item.conversation) for item in items}
    asked = [item for item in items if len(prompts[item.id]) + task.max_new_tokens <= config.max_model_len]
    answers = engine.sample(
        [Ask(prompt_token_ids=prompts[item.id], seed=0) for item in asked],
        Sampling(temperature=0.0, top_p=1.0, max_new_tokens=task.max_new_tokens),
        stage="capability",
    )
    texts = {item.id: chat.text(answer.token_ids) for item, answer in zip(asked, answers, strict=True)}
    return [
        CapabilityRow(
            task=task.id,
            item_id=item.id,
            measure="correct",
            value=float(folded(texts[item.id]) in map(folded, item.answer)) if item.id in texts else None,
            response=texts.get(item.id, ""),
        )
        for item in items
    ]


def _multiple_choice(
    task: MultipleChoiceTask, items: Sequence[MultipleChoiceItem], engine: Engine, chat: Chat, config: EngineConfig
) -> list[CapabilityRow]:
    likely = score_choices(items, engine, chat, config, per_token=task.length_normalised)
    return [_choice_row(task, item, values) for item, values in zip(items, likely, strict=True)]


def score_choices(
    items: Sequence[MultipleChoiceItem], engine: Engine, chat: Chat, config: EngineConfig, *, per_token: bool
) -> list[list[float | None]]:
    """Of each item, each choice's log-prob after the prompt: the sum over its tokens, or their mean."""
    asked = [
        (chat.prompt_ids(item.conversation), [chat.text_ids(choice, begin=False) for choice in item.choices]) for item in items
    ]
    sequences = ((*prompt, *choice) for prompt, choices in asked for choice in choices)
    scored = iter(_score(engine, sequences, max_tokens=config.max_model_len - 1))
    sums = [[_sum(next(scored), last=len(choice)) for choice in choices] for _, choices in asked]
    return [
        [
            None if total is None else total / (len(choice) if per_token else 1)
            for total, choice in zip(totals, choices, strict=True)
        ]
        for totals, (_, choices) in zip(sums, asked, strict=True)
    ]


def _choice_row(task: MultipleChoiceTask, item: MultipleChoiceItem, values: Sequence[float | None]) -> CapabilityRow:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return CapabilityRow(task=task.id, item_id=item.id, measure="correct", value=None)
    best = [index for index, value in enumerate(known) if value == max(known)]
    return CapabilityRow(
        task=task.id,
        item_id=item.id,
        measure="correct",
        value=float(best == [item.answer]),
        response=" = ".join(item.choices[index] for index in best),
    )


def _perplexity(
    task: PerplexityTask, items: Sequence[Document], engine: Engine, chat: Chat, config: EngineConfig
) -> list[CapabilityRow]:
    """weight: the tokens that are predicted, which is all but the first."""
    texts = [chat.text_ids(item.text, begin=True) for item in items]
    parts = [windows(ids, config.max_model_len - 1) for ids in texts]
    scored = iter(_score(engine, (part for document in parts for part in document), max_tokens=config.max_model_len - 1))
    rows = []
    for item, ids, document in zip(items, texts, parts, strict=True):
        sums = [_sum(next(scored)) for _ in document]
        known = [total for total in sums if total is not None]
        whole = bool(sums) and len(known) == len(sums)
        rows.append(
            CapabilityRow(
                task=task.id,
                item_id=item.id,
                measure="nll",
                value=-math.fsum(known) if whole else None,
                weight=float(max(1, len(ids) - 1)),
            )
        )
    return rows


def windows(ids: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Runs of at most `size` tokens that overlap in one, so that every token but the first is predicted once; none for a single token."""
    return [ids[begin : begin + size] for begin in range(0, len(ids) - 1, size - 1)]


def _score(engine: Engine, sequences: Iterable[tuple[int, ...]], *, max_tokens: int) -> list[list[float] | None]:
    """Log-probs as Engine.score gives them; None where a sequence is longer than `max_tokens`."""
    wanted = list(sequences)
    fitting = [index for index, ids in enumerate(wanted) if len(ids) <= max_tokens]
    scored: list[list[float] | None] = [None] * len(wanted)
    for begin in range(0, len(fitting), SCORE_BATCH):
        batch = fitting[begin : begin + SCORE_BATCH]
        for index, logprobs in zip(batch, engine.score([wanted[i] for i in batch], with_adapter=True), strict=True):
            scored[index] = logprobs
    return scored


def _sum(logprobs: list[float] | None, *, last: int | None = None) -> float | None:
    """Of the last so many, or of all; None where there are none, or one is not finite."""
    if logprobs is None:
        return None
    counted = logprobs if last is None else logprobs[len(logprobs) - last :]
    return math.fsum(counted) if all(math.isfinite(x) for x in counted) else None
