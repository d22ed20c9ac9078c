"""Judge of kind `reward_model`: a sequence-classification model scores each answer; p_left = sigmoid(r_left - r_right) (Bradley-Terry).

Conversations go through the model's own chat template and are scored in batches of equal-ish length: all comparisons that are asked in
one turn of the event loop go through the model together. The order of two answers cannot matter to it.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

from dpo_loop.errors import InputError
from dpo_loop.types import Decided, Graded, Outcome, Undecided, UndecidedReason
from judges.backend import BackendSpec, JudgeRequest, Reply
from judges.config import RewardModelJudge
from judges.weights import weights_identity

if TYPE_CHECKING:
    from dpo_loop.types import Prompt

_MOST_SCORES_KEPT = 100_000


class RewardModelBackend:
    """Raises InputError if the model cannot be loaded, has no chat template or more than one output."""

    def __init__(self, config: RewardModelJudge) -> None:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._config, self._torch = config, torch
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(config.model, revision=config.revision)
            model = AutoModelForSequenceClassification.from_pretrained(config.model, revision=config.revision)
        except (OSError, ValueError) as error:
            raise InputError(f"judge.model: {config.model} cannot be loaded as a reward model: {error}") from error
        if model.config.num_labels != 1:
            raise InputError(f"judge.model: {config.model} has {model.config.num_labels} outputs; a reward model has one")
        if self._tokenizer.chat_template is None:
            raise InputError(
                f"judge.model: the tokenizer of {config.model} has no chat template, which a reward model was trained with"
            )
        if self._tokenizer.pad_token_id is None:
            raise InputError(f"judge.model: the tokenizer of {config.model} has no pad token; a batch needs one")
        model.config.pad_token_id = self._tokenizer.pad_token_id
        self._tokenizer.padding_side = "right"
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().to(self._device)
        self._spec = BackendSpec(
            name=f"reward_model:{config.model}",
            identity={
                "kind": "reward_model",
                **weights_identity(config.model, getattr(model.config, "_commit_hash", None) or config.revision),
                "max_length": config.max_length,
            },
            concurrency=4 * config.batch_size,
            is_instant=True,
            family=config.family,
        )
        self._scores: dict[tuple[str, str], float | None] = {}
        self._waiting: dict[tuple[str, str], Prompt] = {}
        self._batch: asyncio.Future[None] | None = None

    @property
    def spec(self) -> BackendSpec:
        return self._spec

    async def ask(self, request: JudgeRequest) -> Reply:
        started = time.monotonic()
        texts = [request.left] if request.right is None else [request.left, request.right]
        scores = [await self._score(request.prompt, text) for text in texts]
        return Reply(
            outcome=_outcome(scores),
            raw=" ".join("too long" if score is None else f"{score:.6g}" for score in scores),
            cost_usd=0.0,
            latency_s=round(time.monotonic() - started, 6),
            served_model=self._config.model,
        )

    async def aclose(self) -> None:
        self._scores.clear()

    async def _score(self, prompt: Prompt, text: str) -> float | None:
        """None where conversation and answer are longer than the model reads."""
        name = (prompt.id, text)
        while name not in self._scores:
            self._waiting[name] = prompt
            if self._batch is None:
                self._batch = asyncio.get_running_loop().create_future()
                asyncio.get_running_loop().call_soon(self._flush, self._batch)
            await self._batch
        return self._scores[name]

    def _flush(self, done: asyncio.Future[None]) -> None:
        waiting, self._waiting, self._batch = self._waiting, {}, None
        if len(self._scores) > _MOST_SCORES_KEPT:
            self._scores.clear()
        try:
            self._score_all(waiting)
        except Exception as error:
            done.set_exception(error)
        else:
            done.set_result(None)

    def _score_all(self, waiting: dict[tuple[str, str], Prompt]) -> None:
        ids = {name: self._ids(prompt, name[1]) for name, prompt in waiting.items()}
        self._scores |= {name: None for name, tokens in ids.items() if len(tokens) > self._config.max_length}
        fitting = sorted((name for name in ids if name not in self._scores), key=lambda name: len(ids[name]))
        for start in range(0, len(fitting), self._config.batch_size):
            names = fitting[start : start + self._config.batch_size]
            batch = self._tokenizer.pad({"input_ids": [ids[name] for name in names]}, return_tensors="pt").to(self._device)
            with self._torch.inference_mode():
                logits = self._model(**batch).logits
            self._scores |= dict(zip(names, logits[:, 0].float().tolist(), strict=True))

    def _ids(self, prompt: Prompt, text: str) -> list[int]:
        messages: list[dict[str, Any]] = [message.model_dump() for message in prompt.messages]
        chat = self._tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
        return list(self._tokenizer(chat, add_special_tokens=False)["input_ids"])


def _outcome(scores: list[float | None]) -> Outcome:
    if any(score is None or not math.isfinite(score) for score in scores):
        why = "longer than judge.max_length" if None in scores else "the model's score is not a number"
        return Undecided(reason=UndecidedReason.TRUNCATED if None in scores else UndecidedReason.MALFORMED, detail=why)
    known = [score for score in scores if score is not None]
    return Graded(quality=_sigmoid(known[0])) if len(known) == 1 else Decided(p_left=_sigmoid(known[0] - known[1]))


def _sigmoid(value: float) -> float:
    return 0.5 * (1 + math.tanh(value / 2))
