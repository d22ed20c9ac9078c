"""How long a sequence a model can take: past the end of a learned table it fails, past that of rotary ones it answers noise without a word."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from dpo_loop.errors import PolicyError
from dpo_loop.progress import say

_NAMES = ("max_position_embeddings", "max_seq_len")
"""transformers maps what other families call it onto the first; MPT's is the second."""
_STRETCHED = {"linear", "dynamic", "yarn"}
"""Rotary positions whose limit in config.json may be the one from before they were stretched; others' is the one after."""


def num_positions(path: str) -> int | None:
    """Tokens of the longest sequence that the model knows positions for, from config.json; None where it sets no limit."""
    config = AutoConfig.from_pretrained(path).get_text_config()
    limits = [limit for name in _NAMES if isinstance(limit := getattr(config, name, None), int) and limit > 0]
    if not limits:
        return None
    return max(min(limits), *(_stretched(rope, min(limits)) for rope in _rotary(config)), 0)


def _rotary(config: Any) -> list[dict[str, Any]]:
    """Parameters of rotary positions: one set, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    return [each for each in (found, *found.values()) if isinstance(each, dict)]


def _stretched(rope: dict[str, Any], limit: int) -> int:
    if rope.get("rope_type") not in _STRETCHED:
        return 0
    return round((rope.get("original_max_position_embeddings") or limit) * (rope.get("factor") or 1))


def longest_length(max_length: int, path: str, *, stage: str) -> int:
    """max_length of the config, or what the model can take where that is less; then a line of the stage says so."""
    limit = num_positions(path)
    if limit is None or limit >= max_length:
        return max_length
    say(f"{stage}: sequences of at most {limit} tokens, for which the model has positions; max_length is {max_length}")
    return limit


def check_rotary(config: Any, longest: int, where: str) -> None:
    """Raises PolicyError for positions whose frequencies follow from the longest sequence of a forward, so that they differ from batch to batch.

    longest: tokens of the longest sequence. Up to the length that the model was first trained with, there is nothing of the kind.
    """
    config = config.get_text_config()
    for rope in _rotary(config):
        kind = rope.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            continue
        limit = (rope if kind == "longrope" else {}).get("original_max_position_embeddings") or config.max_position_embeddings
        if longest > limit:
            raise PolicyError(
                f"{where} has {kind} positions: beyond {limit} tokens they depend on the longest sequence of a batch, and here are sequences of "
                f"{longest}. Lower max_length to {limit}, or give a model with other positions"
            )
