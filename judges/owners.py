"""Who writes to a ledger, and who of them still lives.

An owner holds a flock on a file of its own for as long as its process lives: the kernel gives the lock back however the process ends, which
is how others see that it did.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo_loop.errors import BusyError
from dpo_loop.files import hold


class Owners:
    def __init__(self, folder: Path, mine: str) -> None:
        self._folder, self.mine = folder, mine

    @classmethod
    @contextmanager
    def join(cls, folder: Path) -> Iterator[Owners]:
        """One more, until the end of the block. Raises OSError if the folder cannot be written."""
        folder.mkdir(parents=True, exist_ok=True)
        owners = cls(folder, secrets.token_hex(8))
        mark = folder / owners.mine
        try:
            with hold(mark, wait_s=0, what=f"owner {owners.mine} of {folder}"):
                yield owners
        finally:
            mark.unlink(missing_ok=True)

    def is_alive(self, owner: str) -> bool:
        if owner == self.mine:
            return True
        mark = self._folder / owner
        if not mark.exists():
            return False
        try:
            with hold(mark, wait_s=0, what=f"owner {owner}"):
                mark.unlink(missing_ok=True)
                return False
        except BusyError:
            return True
