"""How a stage that could not finish tells the process that started it: `failed/<stage>.json`, and the same error raised again there."""

from __future__ import annotations

import contextlib

from dpo_loop import errors
from dpo_loop.artifacts import now
from dpo_loop.errors import ConfigError, DpoLoopError, InputError, StageFailedError
from dpo_loop.files import read_json, write_json
from dpo_loop.layout import RoundDir
from dpo_loop.types import Record


class StageFailure(Record):
    """`failed/<stage>.json`: why a stage could not finish, for the process that started it. kind: the name of the error's class."""

    kind: str
    message: str
    exit_code: int
    retryable: bool
    failed_at: str


def record_failure(here: RoundDir, name: str, error: DpoLoopError) -> None:
    failure = StageFailure(
        kind=type(error).__name__,
        message=str(error),
        exit_code=error.exit_code,
        retryable=error.retryable,
        failed_at=now(),
    )
    with contextlib.suppress(OSError):  # a full disk: the message is on the log and the exit code says the rest
        here.failure(name).parent.mkdir(parents=True, exist_ok=True)
        write_json(here.failure(name), failure)


def read_failure(here: RoundDir, name: str) -> StageFailure | None:
    path = here.failure(name)
    return read_json(path, StageFailure) if path.is_file() else None


def stage_error(here: RoundDir, name: str, exit_code: int, tail: str) -> DpoLoopError:
    """The error with which a stage's process ended, as the class that it raised there; StageFailedError if it left no word."""
    failure = read_failure(here, name)
    if failure is None:
        return StageFailedError(name, exit_code, tail)
    error = class_of(failure)(failure.message)
    error.retryable = failure.retryable
    error.exit_code = failure.exit_code
    return error


def class_of(failure: StageFailure) -> type[DpoLoopError]:
    """The class of the recorded error; a more general one where the class is unknown here or is made of more than a message."""
    kind = getattr(errors, failure.kind, None)
    if isinstance(kind, type) and issubclass(kind, DpoLoopError) and kind not in (ConfigError, StageFailedError):
        return kind
    return InputError if failure.exit_code == InputError.exit_code else DpoLoopError
