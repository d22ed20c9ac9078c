"""Files that survive a crash: atomic writes, JSON and JSONL in and out, locks that a dead process cannot keep."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from dpo_loop.errors import BusyError, CorruptArtifactError

Model = TypeVar("Model", bound=BaseModel)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: aside, fsync, rename."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def write_json(path: Path, value: BaseModel | Any) -> None:
    """One JSON value, atomically, indented for people."""
    if isinstance(value, BaseModel):
        write_text(path, value.model_dump_json(indent=1) + "\n")
    else:
        write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[BaseModel | Mapping[str, Any]]) -> int:
    """One JSON object a line; returns how many."""
    num_rows = 0
    with jsonl_writer(path) as write:
        for row in rows:
            write(row)
            num_rows += 1
    return num_rows


@contextmanager
def jsonl_writer(path: Path) -> Iterator[Callable[[BaseModel | Mapping[str, Any]], None]]:
    """Takes one row at a time, so that what is written need not be kept."""
    with path.open("w", encoding="utf-8") as file:
        yield lambda row: print(
            row.model_dump_json() if isinstance(row, BaseModel) else json.dumps(row, ensure_ascii=False), file=file
        )


def read_json(path: Path, model: type[Model]) -> Model:
    """A file that the project wrote. Raises CorruptArtifactError if it is something else, or of another version of dpo-loop."""
    try:
        return model.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CorruptArtifactError(
            f"{path} is not a {model.__name__} of this version of dpo-loop ({f'{where}: ' if where else ''}{first['msg']}). Ways out: use the "
            "version that wrote it, or put back the file as it was."
        ) from error


def read_jsonl(path: Path, model: type[Model]) -> Iterator[Model]:
    """Rows of a file that the project wrote. Raises CorruptArtifactError with the line number."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield model.model_validate_json(line)
            except ValidationError as error:
                raise CorruptArtifactError(f"{path}:{number} is not a {model.__name__}: {error.errors()[0]['msg']}") from error


def sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(Path(folder))


def sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def hold(lock: Path, *, wait_s: float, what: str) -> Iterator[None]:
    """Hold an exclusive flock; it is released by the end of the process, however it ends. Raises BusyError after wait_s."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a+") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    holder = file.read().strip() or "unknown"
                    raise BusyError(
                        f"{what} is held by another process (pid {holder}). Wait for it to end, or end it, then try again."
                    ) from None
                time.sleep(min(0.1, wait_s))
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
