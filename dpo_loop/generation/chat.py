"""The one place where text becomes token ids, and sampled ids become text (facts/training.md T1-T5)."""

from __future__ import annotations

import hashlib
from typing import Any

from jinja2 import TemplateError

from dpo_loop.errors import PolicyError
from dpo_loop.types import PolicyRef, Prompt


class Chat:
    """The policy's tokenizer and chat template."""

    def __init__(self, policy: PolicyRef) -> None:
        from transformers import AutoTokenizer

        self._where = policy.base
        self._tokenizer: Any = AutoTokenizer.from_pretrained(policy.base, revision=policy.revision)

    @property
    def template_sha256(self) -> str:
        return hashlib.sha256(str(self._tokenizer.chat_template).encode()).hexdigest()

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids of the messages with the generation prompt. Raises PolicyError if the template cannot render them, or doubles the BOS."""
        messages = [message.model_dump() for message in prompt.messages]
        try:
            # return_dict=False: plain ids; transformers 5 gives a mapping by default.
            ids = tuple(self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False))
        except (TemplateError, ValueError, TypeError) as error:
            raise PolicyError(f"the chat template of {self._where} cannot render prompt {prompt.id}: {error}") from error
        bos = self._tokenizer.bos_token_id
        if bos is not None and ids[:2] == (bos, bos):
            raise PolicyError(
                f"the chat template of {self._where} begins prompts with two BOS tokens; take one out of the template (or out of the "
                "tokenizer's post-processor) and save the tokenizer again"
            )
        return ids

    def text_ids(self, text: str, *, begin: bool) -> tuple[int, ...]:
        """Ids of plain text, outside any turn. begin: with the BOS token, where the tokenizer has one."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        bos = self._tokenizer.bos_token_id
        return (bos, *ids) if begin and bos is not None else tuple(ids)

    def text(self, token_ids: tuple[int, ...]) -> str:
        """Without special tokens, otherwise as sampled: no clean-up of spaces."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
