"""Progress of a stage: plain lines on standard output. Its process's output is its log, which the flow tails and shows."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
