"""How long to wait before asking again: what the server asks for, within reason, else longer and longer with jitter."""

from __future__ import annotations

import email.utils
import math
import random
from collections.abc import Mapping

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0
LONGEST_RETRY_AFTER_S = 60.0
"""A server may ask for more; one wrong header must not stop a judge for hours."""


def pause_s(attempts: int, *, at_least: float = 0.0) -> float:
    """Full jitter: uniform up to a bound that doubles with every attempt, so that many clients do not come back together.

    https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter
    """
    return max(at_least, random.uniform(0, min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**attempts)))


def retry_after_s(headers: Mapping[str, str], *, now: float) -> float | None:
    """Seconds to wait that a reply asks for: `retry-after-ms`, `retry-after` in seconds or as a date; None if it does not say."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        text = headers.get(name)
        if text is None:
            continue
        try:
            seconds = float(text) * scale
        except ValueError:
            try:
                seconds = email.utils.parsedate_to_datetime(text).timestamp() - now
            except ValueError:
                continue
        if not math.isnan(seconds):
            return max(0.0, seconds)
    return None
