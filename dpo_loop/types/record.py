"""What every noun and config is: a frozen record that forbids unknown fields, and ids that are hashes of content."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Base of every noun and config: immutable, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants", allow_inf_nan=True)


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text, on which every key of the project is a hash."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_id(*parts: Any) -> str:
    """First 16 hex digits of the sha256 over the canonical JSON of `parts`."""
    return hashlib.sha256(canonical_json(list(parts)).encode()).hexdigest()[:16]
