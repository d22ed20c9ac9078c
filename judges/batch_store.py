"""What is known of batches, in the ledger's file: which calls sit in which batch, and the rows that came back.

    planned   keys are written down, nothing is known to have been sent
    open      the vendor's id is written down; its one row stands for all keys of the batch
    read      every row that the vendor gave is in this file

A call is in one batch at most: planning it anew moves it. A row stays until the ledger has the call's final reply, so a process that
dies between the two reads it again instead of paying again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from dpo_loop.errors import BusyError, StorageError
from judges.batch_vendor import Plan, Row

_TABLES = """
CREATE TABLE IF NOT EXISTS batches (
  plan TEXT PRIMARY KEY, num_rows INTEGER NOT NULL, made_at REAL NOT NULL, vendor_id TEXT,
  is_read INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch_calls (
  key TEXT PRIMARY KEY, plan TEXT NOT NULL, status INTEGER, payload BLOB
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS batch_calls_of_plan ON batch_calls (plan);
CREATE TABLE IF NOT EXISTS batch_strangers (vendor_id TEXT PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Known:
    """Of a call that was planned before. row None: its batch was not read yet."""

    plan: str
    row: Row | None


class BatchStore:
    """Of one thread. Raises StorageError (disk full, read-only), BusyError (locked for 30 s)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._errors():
            self._db = sqlite3.connect(path, timeout=30.0, isolation_level=None)
            self._db.executescript(_TABLES)
        self._purge()

    def close(self) -> None:
        self._db.close()

    def find(self, key: str) -> Known | None:
        with self._errors():
            found = self._db.execute("SELECT plan, status, payload FROM batch_calls WHERE key = ?", (key,)).fetchone()
        if found is None:
            return None
        plan, status, payload = found
        return Known(plan, None if status is None else Row(key, status, payload))

    def plan_of(self, plan: str) -> tuple[Plan, str | None] | None:
        """The plan and the vendor's id, None for an id that is not known; None if there is no such plan (any more)."""
        with self._errors():
            found = self._db.execute("SELECT num_rows, made_at, vendor_id FROM batches WHERE plan = ?", (plan,)).fetchone()
        return None if found is None else (Plan(plan, found[0], found[1]), found[2])

    def make(self, plan: Plan, keys: Sequence[str]) -> None:
        with self._transaction():
            self._db.execute(
                "INSERT INTO batches (plan, num_rows, made_at) VALUES (?, ?, ?)", (plan.id, plan.num_rows, plan.made_at)
            )
            self._db.executemany("INSERT OR REPLACE INTO batch_calls (key, plan) VALUES (?, ?)", [(key, plan.id) for key in keys])

    def open(self, plan: str, vendor_id: str) -> None:
        with self._transaction():
            self._db.execute("UPDATE batches SET vendor_id = ? WHERE plan = ?", (vendor_id, plan))

    def disown(self, plan: str, vendor_id: str) -> None:
        """The batch that was taken for this plan's is somebody else's: the plan has none again."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO batch_strangers VALUES (?)", (vendor_id,))
            self._db.execute("UPDATE batches SET vendor_id = NULL WHERE plan = ?", (plan,))

    def known_ids(self) -> set[str]:
        with self._errors():
            found = self._db.execute(
                "SELECT vendor_id FROM batches WHERE vendor_id NOT NULL UNION SELECT vendor_id FROM batch_strangers"
            )
            return {row[0] for row in found}

    def keep(self, plan: str, rows: Iterable[Row]) -> None:
        """End of a batch: its rows, once each. Calls of the plan without one are in no batch any more."""
        with self._transaction():
            self._db.executemany(
                "UPDATE batch_calls SET status = ?, payload = ? WHERE key = ? AND plan = ?",
                ((row.status, row.payload, row.key, plan) for row in rows),
            )
            self._db.execute("DELETE FROM batch_calls WHERE plan = ? AND status IS NULL", (plan,))
            self._db.execute("UPDATE batches SET is_read = 1 WHERE plan = ?", (plan,))

    def drop(self, plan: str) -> None:
        """The batch does not exist: its calls may be planned anew."""
        with self._transaction():
            self._db.execute("DELETE FROM batch_calls WHERE plan = ? AND status IS NULL", (plan,))
            self._db.execute("DELETE FROM batches WHERE plan = ?", (plan,))

    def forget(self, keys: Sequence[str]) -> None:
        """Rows that hold no final reply: read once, then of no use."""
        with self._transaction():
            self._db.executemany("DELETE FROM batch_calls WHERE key = ?", [(key,) for key in keys])

    def times_planned(self) -> int:
        with self._errors():
            return int(self._db.execute("SELECT count(*) FROM batches").fetchone()[0])

    def _purge(self) -> None:
        """Rows whose replies the ledger has."""
        with self._transaction():
            if self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'calls'").fetchone():
                self._db.execute("DELETE FROM batch_calls WHERE key IN (SELECT key FROM calls WHERE status = 'done')")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if getattr(error, "sqlite_errorname", "").split("_")[1:2] in (["BUSY"], ["LOCKED"]):
                raise BusyError(f"the ledger {self._path} has been locked by another process for 30 s; try again later.") from error
            raise StorageError(
                f"cannot write batches to the ledger {self._path}: {error}. Free space or mend the permissions, then run the same command "
                "again; a batch that was sent is joined, not paid again."
            ) from error


def new_plan(keys: Iterable[str], times_planned: int) -> Plan:
    """times_planned: how many plans there were before, so that calls that are planned again make another plan."""
    ordered = sorted(keys)
    digest = hashlib.sha256("\n".join([str(times_planned), *ordered]).encode()).hexdigest()
    return Plan(digest, len(ordered), time.time())
