"""What is known of batches, in the ledger's file: which lines sit in which batch, and the rows that came back.

    planned   the lines are written down and the money is set aside, nothing is known to have been sent
    open      the vendor's id is written down; its one row stands for all lines of the batch
    read      every row that the vendor gave is in this file

A line is in one batch at most: planning it anew moves it. A row stays until the ledger has the call's reply, so a process that dies
between the two reads it again instead of paying again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Mapping, Sequence

from judges.batches.vendor import Line, Plan, Row
from judges.budget import Change
from judges.ledger import Ledger

_TABLES = (
    """
CREATE TABLE IF NOT EXISTS batches (
  plan TEXT PRIMARY KEY, num_lines INTEGER NOT NULL, num_bytes INTEGER NOT NULL, made_at REAL NOT NULL, vendor_id TEXT
) WITHOUT ROWID
""",
    """
CREATE TABLE IF NOT EXISTS batch_lines (
  line TEXT PRIMARY KEY, key TEXT NOT NULL, plan TEXT NOT NULL, status INTEGER, payload BLOB
) WITHOUT ROWID
""",
    "CREATE INDEX IF NOT EXISTS batch_lines_of_plan ON batch_lines (plan)",
    "CREATE INDEX IF NOT EXISTS batch_lines_of_key ON batch_lines (key)",
    # A kill between the reply and its row's end leaves the row.
    "DELETE FROM batch_lines WHERE key IN (SELECT key FROM calls WHERE status = 'done')",
)


class BatchStore:
    """Of one open ledger. Raises what the ledger raises."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        ledger.queue(_make_tables)

    def find(self, line: str) -> Plan | Row | None:
        """The row of a line, else the plan it sits in, None if it is in no batch."""
        found = self._ledger.read(
            lambda db: db.execute("SELECT plan, status, payload FROM batch_lines WHERE line = ?", (line,)).fetchone()
        )
        if found is None:
            return None
        plan, status, payload = found
        return self._plan(plan) if status is None else Row(line, status, payload)

    def _plan(self, plan: str) -> Plan | None:
        found = self._ledger.read(
            lambda db: db.execute(
                "SELECT plan, num_lines, num_bytes, made_at, vendor_id FROM batches WHERE plan = ?", (plan,)
            ).fetchone()
        )
        return None if found is None else Plan(*found)

    def new_plan(self, lines: Sequence[Line], num_bytes: int) -> Plan:
        """Calls that are planned again make another plan."""
        num_before = self._ledger.read(lambda db: db.execute("SELECT count(*) FROM batches").fetchone())[0]
        digest = hashlib.sha256("\n".join([str(num_before), *sorted(line.id for line in lines)]).encode()).hexdigest()
        return Plan(digest, len(lines), num_bytes, time.time())

    def lines_of(self, plan: Plan) -> set[str]:
        """That wait for their row."""
        rows = self._ledger.read(
            lambda db: db.execute("SELECT line FROM batch_lines WHERE plan = ? AND status IS NULL", (plan.id,)).fetchall()
        )
        return {row[0] for row in rows}

    def vendor_ids(self) -> set[str]:
        rows = self._ledger.read(lambda db: db.execute("SELECT vendor_id FROM batches WHERE vendor_id NOT NULL").fetchall())
        return {row[0] for row in rows}

    async def open(self, plan: Plan, vendor_id: str) -> None:
        await self._ledger.write(
            lambda db: _done(db.execute("UPDATE batches SET vendor_id = ? WHERE plan = ?", (vendor_id, plan.id)))
        )

    def forget(self, key: str) -> None:
        """All rows of a call that has its reply: queued, so that it goes into the transaction of whatever is written in the same turn."""
        self._ledger.queue(lambda db: _done(db.execute("DELETE FROM batch_lines WHERE key = ?", (key,))))


def made(plan: Plan, lines: Sequence[Line]) -> Change:
    keys = [(line.id, line.key, plan.id) for line in lines]

    def work(db: sqlite3.Connection) -> None:
        db.execute(
            "INSERT INTO batches (plan, num_lines, num_bytes, made_at) VALUES (?, ?, ?, ?)",
            (plan.id, plan.num_lines, plan.num_bytes, plan.made_at),
        )
        db.executemany("INSERT OR REPLACE INTO batch_lines (line, key, plan) VALUES (?, ?, ?)", keys)

    return work


def kept(plan: Plan, rows: Mapping[str, Row]) -> Change:
    """End of a batch: its rows. Lines of the plan without one are in no batch any more. The batch itself stays, so that its id is known as ours."""

    def work(db: sqlite3.Connection) -> None:
        db.executemany(
            "UPDATE batch_lines SET status = ?, payload = ? WHERE line = ? AND plan = ?",
            ((row.status, row.payload, row.line, plan.id) for row in rows.values()),
        )
        db.execute("DELETE FROM batch_lines WHERE plan = ? AND status IS NULL", (plan.id,))

    return work


def dropped(plan: Plan) -> Change:
    """The batch came to nothing: its lines may be planned anew."""
    return kept(plan, {})


def _make_tables(db: sqlite3.Connection) -> None:
    for statement in _TABLES:
        db.execute(statement)


def _done(_: sqlite3.Cursor) -> None:
    """A change has no result."""
