"""An append-only JSONL file that survives `kill -9`: rows are durable when `append` returns; a torn last line is cut off on opening."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Journal:
    """`rows` are those found on opening, in order; `append` adds to the file, not to `rows`.

    Raises ValueError if a line other than the last is not JSON: that is damage, not a crash while writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, Any]] = []
        self._file = path.open("ab+")
        self._repair()

    def _repair(self) -> None:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        whole_bytes = 0
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line) if line.endswith(b"\n") else None
            except ValueError as error:
                if number < len(lines):
                    self._file.close()
                    raise ValueError(f"{self.path}:{number} is damaged: {error}") from error
                row = None
            if row is None:
                break
            self.rows.append(row)
            whole_bytes += len(line)
        self._file.truncate(whole_bytes)
        self._file.seek(0, os.SEEK_END)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        self._file.write(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
