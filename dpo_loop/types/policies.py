"""A policy: base model plus at most one adapter, known by its weights."""

from __future__ import annotations

from dpo_loop.types.record import Record, content_id


class PolicyRef(Record):
    """Base model plus at most one LoRA adapter. Paths say where to load it; the hashes say what it is.

    base: directory or hub id. base_sha256: over the weights, config and tokenizer files (`artifacts.fingerprint`); for a hub
    id, over the resolved snapshot. adapter: directory of a PEFT adapter or None. canary: JSON file with log-probs by transformers+peft
    that an engine must reproduce before it may serve this policy (`training/canary.py` writes it), or None if there is none yet.
    """

    base: str
    revision: str | None = None
    base_sha256: str
    adapter: str | None = None
    adapter_sha256: str | None = None
    canary: str | None = None

    @property
    def key(self) -> str:
        """Identity by content: two directories with the same weights are the same policy."""
        return content_id("policy", self.base_sha256, self.adapter_sha256)
