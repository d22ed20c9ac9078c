"""What is known of batches, in the ledger's file: which lines sit in which batch, and the rows that came back.

    planned   the lines are written down and the money is set aside, nothing is known to have been sent
    open      the vendor's id is written down; its one row stands for all lines of the batch
    ended     every row that came is in this file, and the money is settled

A line is in one batch at most, and stays in it until the batch has ended. A row stays until the ledger has the call's reply, so a process
that dies between the two reads it again instead of paying again.
"""

from __future__ import annotations

import hashlib
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_loop.errors import InputError
from dpo_loop.types import canonical_json
from judges.batches.vendor import Line, Plan, Row
from judges.budget import Change
from judges.ledger import Ledger

_TABLES = (
    """
CREATE TABLE IF NOT EXISTS batches (
  plan TEXT PRIMARY KEY, judge TEXT NOT NULL, num_lines INTEGER NOT NULL, num_bytes INTEGER NOT NULL, made_at REAL NOT NULL,
  vendor_id TEXT, ended_at REAL
) WITHOUT ROWID
""",
    """
CREATE TABLE IF NOT EXISTS batch_lines (
  line TEXT PRIMARY KEY, key TEXT NOT NULL, plan TEXT NOT NULL, status INTEGER, payload BLOB
) WITHOUT ROWID
""",
    "CREATE INDEX IF NOT EXISTS batch_lines_of_plan ON batch_lines (plan)",
    "CREATE INDEX IF NOT EXISTS batch_lines_of_key ON batch_lines (key)",
    # Rows of calls that were answered directly meanwhile.
    """
DELETE FROM batch_lines WHERE key IN (SELECT key FROM calls WHERE status = 'done')
AND plan IN (SELECT plan FROM batches WHERE ended_at NOT NULL)
""",
)
_PLAN = "SELECT plan, num_lines, num_bytes, made_at, vendor_id FROM batches"


class BatchStore:
    """Of one open ledger and one judge, told by its identity. Raises what the ledger raises."""

    def __init__(self, ledger: Ledger, identity: Mapping[str, Any]) -> None:
        self._ledger = ledger
        self._judge = hashlib.sha256(canonical_json(identity).encode()).hexdigest()
        ledger.queue(_make_tables)

    def refuse_direct_calls(self, model: str) -> None:
        """Raises InputError while a batch of this judge is open: its calls would be paid twice."""
        if plans := self.open_plans():
            names = ", ".join(plan.vendor_id or plan.id[:16] for plan in plans)
            raise InputError(
                f"judge.batch: {len(plans)} batches of {model} are under way ({names}), and asking directly would pay for their calls a second "
                "time. Put `judge.batch` back until they are read, or give them up: --set 'judge.batch.give_up=[\"...\"]' with their names."
            )

    def open_plans(self) -> list[Plan]:
        """Of this judge, that have not ended."""
        return [Plan(*row) for row in self._select(f"{_PLAN} WHERE judge = ? AND ended_at IS NULL", (self._judge,))]

    def find(self, line: str) -> Plan | Row | None:
        """The row of a line, else the plan it sits in, None if it is in no batch."""
        rows = self._select("SELECT plan, status, payload FROM batch_lines WHERE line = ?", (line,))
        if not rows:
            return None
        plan, status, payload = rows[0]
        if status is not None:
            return Row(line, status, payload)
        return next((Plan(*row) for row in self._select(f"{_PLAN} WHERE plan = ?", (plan,))), None)

    def new_plan(self, lines: Sequence[Line], num_bytes: int) -> Plan:
        """Calls that are planned again make another plan."""
        num_before = self._select("SELECT count(*) FROM batches")[0][0]
        digest = hashlib.sha256("\n".join([str(num_before), *sorted(line.id for line in lines)]).encode()).hexdigest()
        return Plan(digest, len(lines), num_bytes, time.time())

    def made(self, plan: Plan, lines: Sequence[Line]) -> Change:
        rows = [(line.id, line.key, plan.id) for line in lines]

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO batches (plan, judge, num_lines, num_bytes, made_at) VALUES (?, ?, ?, ?, ?)",
                (plan.id, self._judge, plan.num_lines, plan.num_bytes, plan.made_at),
            )
            db.executemany("INSERT OR REPLACE INTO batch_lines (line, key, plan) VALUES (?, ?, ?)", rows)

        return work

    def lines_of(self, plan: Plan) -> set[str]:
        return {row[0] for row in self._select("SELECT line FROM batch_lines WHERE plan = ?", (plan.id,))}

    def is_ended(self, plan: Plan) -> bool:
        return bool(self._select("SELECT 1 FROM batches WHERE plan = ? AND ended_at NOT NULL", (plan.id,)))

    def vendor_ids(self) -> set[str]:
        return {row[0] for row in self._select("SELECT vendor_id FROM batches WHERE vendor_id NOT NULL")}

    async def open(self, plan: Plan, vendor_id: str) -> None:
        def work(db: sqlite3.Connection) -> None:
            db.execute("UPDATE batches SET vendor_id = ? WHERE plan = ?", (vendor_id, plan.id))

        await self._ledger.write(work)

    def forget(self, key: str) -> None:
        """All rows of a call that has its reply: queued, so that it goes into the transaction of whatever is written in the same turn."""

        def work(db: sqlite3.Connection) -> None:
            db.execute("DELETE FROM batch_lines WHERE key = ? AND status NOT NULL", (key,))

        self._ledger.queue(work)

    def _select(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        return self._ledger.read(lambda db: db.execute(query, values).fetchall())


def ended(plan: Plan, rows: Mapping[str, Row]) -> Callable[[sqlite3.Connection], bool]:
    """End of a batch with the rows that came; none where it came to nothing. Lines without one are in no batch any more. The batch itself stays,
    so that its id is known as ours. False, and nothing is changed, where another process has ended it."""

    def work(db: sqlite3.Connection) -> bool:
        now = time.time()
        if db.execute("UPDATE batches SET ended_at = ? WHERE plan = ? AND ended_at IS NULL", (now, plan.id)).rowcount == 0:
            return False
        db.executemany(
            "UPDATE batch_lines SET status = ?, payload = ? WHERE line = ? AND plan = ?",
            ((row.status, row.payload, row.line, plan.id) for row in rows.values()),
        )
        db.execute("DELETE FROM batch_lines WHERE plan = ? AND status IS NULL", (plan.id,))
        return True

    return work


def _make_tables(db: sqlite3.Connection) -> None:
    for statement in _TABLES:
        db.execute(statement)
