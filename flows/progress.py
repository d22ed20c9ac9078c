"""What happens in a run, as it happens: stages tell, the command line shows. A flow under a Prefect worker has nobody watching here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

from flows.config import RunConfig
from judges.config import RemoteModel, members_of, remotes_of


@dataclass(frozen=True, slots=True)
class Event:
    """found: the stage was done before. text: of a line, its text; of an end, why it failed or ""."""

    kind: Literal["found", "began", "line", "ended"]
    round: int
    stage: str
    text: str = ""
    seconds: float = 0.0


Watcher = Callable[[Event], None]
_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell(event: Event) -> None:
    watcher = _watcher.get()
    if watcher is not None:
        watcher(event)


def is_progress(stage: str, line: str) -> bool:
    """A stage's own progress lines open with a room's word and a colon; the rest of a log is its libraries' noise."""
    return line.startswith(f"{stage}: ")


def redactor(config: RunConfig) -> Callable[[str], str]:
    """Takes the keys that the config names out of a line before it goes to a screen or a server."""
    judges = [member for judge in (config.judge, config.grading.win_judge) if judge for member in members_of(judge)]
    remotes = [judge for judge in (*judges, *remotes_of(config.grading.safety).values()) if isinstance(judge, RemoteModel)]
    names = {remote.api_key_env for remote in remotes if remote.api_key_env}
    secrets = [value for name in names if len(value := os.environ.get(name, "")) >= 8]

    def redact(line: str) -> str:
        for secret in secrets:
            line = line.replace(secret, "***")
        return line

    return redact
