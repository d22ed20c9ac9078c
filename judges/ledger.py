"""Every judge call, once: a SQLite file with one row per call, keyed by the content of the call.

    planned     known, not under way; the state a call returns to when it failed
    in_flight   an owner is asking; if that owner's process is dead the call is anyone's again
    done        a final reply (a decision or a refusal); served from here for ever

Failures are never kept as answers. A killed process leaves rows in flight; they are asked again, and nothing else is. An *owner* is
one open Ledger (owners.py).

Writes are grouped: all that is queued in one turn of the event loop goes into one transaction, and each writer goes on when it is
committed. That is what makes a call cheap; reading is immediate and locks nobody out.

WAL with synchronous=NORMAL: a killed process loses nothing, a power cut may lose the last moments' replies but never the file.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar

from dpo_loop.errors import BusyError, CorruptArtifactError, DpoLoopError, InputError, StorageError
from dpo_loop.types import canonical_json
from judges.backend import Reply
from judges.owners import Owners

SCHEMA_VERSION = 1
FLUSH_ROWS = 2_000
"""Rows that `keep` holds back before it writes them in one transaction."""

_TABLE = """
CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY,
  status TEXT NOT NULL CHECK (status IN ('planned', 'in_flight', 'done')),
  owner TEXT,
  times_asked INTEGER NOT NULL DEFAULT 0,
  question TEXT NOT NULL,
  reply TEXT,
  last_problem TEXT,
  started_at REAL,
  finished_at REAL,
  CHECK ((status = 'done') = (reply IS NOT NULL))
) WITHOUT ROWID
"""
_CLAIM = """
INSERT INTO calls (key, status, owner, times_asked, question, started_at) VALUES (?, 'in_flight', ?, 1, ?, ?)
ON CONFLICT (key) DO UPDATE SET status = 'in_flight', owner = excluded.owner, times_asked = times_asked + 1, started_at = excluded.started_at
"""
_KEEP = """
INSERT INTO calls (key, status, times_asked, question, reply, started_at, finished_at) VALUES (?, 'done', 1, ?, ?, ?, ?)
ON CONFLICT (key) DO UPDATE SET status = 'done', owner = NULL, times_asked = times_asked + 1, reply = excluded.reply, finished_at = excluded.finished_at
WHERE status != 'done'
"""


_END = "UPDATE calls SET status = ?, owner = NULL, reply = ?, last_problem = ?, finished_at = ? WHERE key = ? AND owner = ?"
Made = TypeVar("Made")


class Claim(Enum):
    MINE = "mine"
    """Ask, then `settle` or `release`."""
    THEIRS = "theirs"
    """Another living owner is asking; look again in a moment."""


class Row(NamedTuple):
    """For audits. question: what the key was hashed from. reply None: not answered for good yet."""

    question: dict[str, Any]
    reply: Reply | None
    times_asked: int


class _Write(Generic[Made]):
    """A change that waits for its turn's transaction."""

    def __init__(self, change: Callable[[sqlite3.Connection], Made], done: asyncio.Future[Made] | None) -> None:
        self._change, self._done = change, done
        self._made: Made | DpoLoopError

    def run(self, db: sqlite3.Connection) -> None:
        try:
            self._made = self._change(db)
        except DpoLoopError as error:
            self._made = error

    def tell(self, failure: BaseException | None = None) -> None:
        if self._done is None or self._done.done() or self._done.get_loop().is_closed():
            return
        if failure is not None:
            self._done.set_exception(failure)
        elif isinstance(self._made, DpoLoopError):
            self._done.set_exception(self._made)
        else:
            self._done.set_result(self._made)


class Ledger:
    """Of one thread and, for writing, of one event loop. Raises StorageError (disk full, read-only), BusyError (locked for 30 s), CorruptArtifactError (not a ledger)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._kept: dict[str, tuple[str, Reply]] = {}
        self._queue: list[_Write[Any]] = []
        self._cleanup = ExitStack()
        try:
            with self._errors():
                self._owners = self._cleanup.enter_context(Owners.join(path.with_name(f".{path.name}.owners")))
            self._db = self._open()
        except BaseException:
            self._cleanup.close()
            raise

    @property
    def owner(self) -> str:
        """Of this open ledger."""
        return self._owners.mine

    def is_alive(self, owner: str) -> bool:
        return self._owners.is_alive(owner)

    # --------------------------------------------------------------------------------------------------- asking

    def find(self, key: str) -> Reply | None:
        """The final reply of a call, None if there is none yet."""
        if key in self._kept:
            return self._kept[key][1]
        with self._errors():
            row = self._db.execute("SELECT reply FROM calls WHERE key = ?", (key,)).fetchone()
        return None if row is None or row[0] is None else Reply.model_validate_json(row[0])

    async def claim(self, key: str, question: Mapping[str, Any]) -> Reply | Claim:
        """The final reply if there is one, else who may ask. question: what the key was hashed from, kept for audits."""
        asked = canonical_json(question)

        def work(db: sqlite3.Connection) -> str | Claim:
            row = db.execute("SELECT status, owner, reply FROM calls WHERE key = ?", (key,)).fetchone()
            match row:
                case ("done", _, str(reply)):
                    return reply
                case ("in_flight", owner, _) if self.is_alive(owner):
                    return Claim.THEIRS
            db.execute(_CLAIM, (key, self.owner, asked, time.time()))
            return Claim.MINE

        found = await self.write(work)
        return found if isinstance(found, Claim) else Reply.model_validate_json(found)

    async def settle(self, key: str, reply: Reply) -> None:
        """End of a claimed call: a final reply is done, any other goes back to be asked again another time."""
        if reply.is_final:
            await self._end(key, "done", reply.model_dump_json(), None)
        else:
            await self._end(key, "planned", None, reply.outcome.model_dump_json())

    def release(self, key: str, problem: str) -> asyncio.Future[None]:
        """End of a claimed call that was cut short: it may be asked again. Queued at once, whether or not it is awaited."""
        return self._end(key, "planned", None, json.dumps(problem))

    def write(self, change: Callable[[sqlite3.Connection], Made]) -> asyncio.Future[Made]:
        """Queue a change for this turn's transaction; what it returns comes when that is committed.

        A change is queued at once and made even if nobody waits for it any more. It may raise a DpoLoopError before it has changed
        anything; any other error undoes the whole transaction and reaches all of its writers.
        """
        done: asyncio.Future[Made] = asyncio.get_running_loop().create_future()
        self._add(_Write(change, done))
        return done

    def queue(self, change: Callable[[sqlite3.Connection], None]) -> None:
        """As `write`, for a change that nobody waits for: if its transaction fails, those who wait for theirs hear of it."""
        self._add(_Write(change, None))

    def _add(self, write: _Write[Any]) -> None:
        if not self._queue:
            asyncio.get_running_loop().call_soon(self._commit)
        self._queue.append(write)

    def read(self, look: Callable[[sqlite3.Connection], Made]) -> Made:
        """Of what is committed, and of this turn's changes."""
        self._commit()
        with self._errors():
            return look(self._db)

    def rows(self, keys: Iterable[str]) -> dict[str, Row]:
        """By key, the calls among `keys` that were ever asked."""
        self.flush()
        found = {}
        for key in keys:
            row = self.read(
                lambda db, key=key: db.execute("SELECT question, reply, times_asked FROM calls WHERE key = ?", (key,)).fetchone()  # type: ignore[misc]
            )
            if row is not None:
                found[key] = Row(json.loads(row[0]), None if row[1] is None else Reply.model_validate_json(row[1]), row[2])
        return found

    def keep(self, key: str, question: Mapping[str, Any], reply: Reply) -> None:
        """A final reply that cost nothing and needed no claim; written with many others, at the latest on closing."""
        if reply.is_final:
            self._kept[key] = (canonical_json(question), reply)
            if len(self._kept) >= FLUSH_ROWS:
                self.flush()

    def flush(self) -> None:
        if self._kept:
            now = time.time()
            rows = [(key, asked, reply.model_dump_json(), now - reply.latency_s, now) for key, (asked, reply) in self._kept.items()]
            with self._transaction():
                self._db.executemany(_KEEP, rows)
            self._kept.clear()

    def counts(self) -> dict[str, int]:
        """Rows by status."""
        self.flush()
        with self._errors():
            return dict(self._db.execute("SELECT status, count(*) FROM calls GROUP BY status ORDER BY status").fetchall())

    def close(self) -> None:
        try:
            self._commit()
            self.flush()
        finally:
            self._db.close()
            self._cleanup.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _end(self, key: str, status: str, reply: str | None, problem: str | None) -> asyncio.Future[None]:
        row = (status, reply, problem, time.time(), key, self.owner)

        def work(db: sqlite3.Connection) -> None:
            db.execute(_END, row)

        return self.write(work)

    def _commit(self) -> None:
        writes, self._queue = self._queue, []
        if not writes:
            return
        try:
            with self._transaction():
                for write in writes:
                    write.run(self._db)
        except Exception as error:
            for write in writes:
                write.tell(error)
        else:
            for write in writes:
                write.tell()

    # --------------------------------------------------------------------------------------------------- database

    def _open(self) -> sqlite3.Connection:
        with self._errors():
            db = sqlite3.connect(self.path, timeout=30.0, isolation_level=None)
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                version = db.execute("PRAGMA user_version").fetchone()[0]
                if version not in (0, SCHEMA_VERSION):
                    raise InputError(
                        f"{self.path} is a ledger of version {version}; this dpo-loop reads version {SCHEMA_VERSION}. Use the dpo-loop that wrote "
                        "it, or move the file away to judge everything anew."
                    )
                db.execute(_TABLE)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            except BaseException:
                db.close()
                raise
            return db

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
        except sqlite3.DatabaseError as error:
            match getattr(error, "sqlite_errorname", "").split("_")[1:2]:
                case ["NOTADB" | "CORRUPT"]:
                    raise CorruptArtifactError(
                        f"{self.path} is not a readable ledger: {error}. Restore it from a backup, or move it away to judge everything anew."
                    ) from error
                case ["FULL" | "READONLY" | "CANTOPEN" | "IOERR" | "PERM"]:
                    raise StorageError(
                        f"cannot write the ledger {self.path}: {error}. Free space or mend the permissions, then run the same command again; "
                        "no finished call is lost."
                    ) from error
                case ["BUSY" | "LOCKED"]:
                    raise BusyError(
                        f"the ledger {self.path} has been locked by another process for 30 s; try again later."
                    ) from error
            raise
        except OSError as error:
            raise StorageError(
                f"cannot write beside the ledger {self.path}: {error}. Free space or mend the permissions, then run the same command again."
            ) from error
