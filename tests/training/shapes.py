"""Models that are only a config.json, as large as real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""Llama 3.1 8B: 8,030,261,248 parameters."""


def write_shape(base: Path, config: dict[str, Any]) -> Path:
    base.mkdir(parents=True)
    (base / "config.json").write_text(json.dumps(config))
    return base
