"""Find out whether rows can be written as the recorder writes them, by writing one.

The recorder's own statements run in a transaction that is rolled back. So columns without a
default, constraints, triggers, policies and missing rights all show.
"""

import json
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import psycopg

from autoflow_worker.clock import now_ms
from autoflow_worker.errors import DatabaseUnavailableError
from autoflow_worker.recording.patches import (
    Record,
    active_patch,
    completed_patch,
    delayed_patch,
    error_record,
    failed_patch,
    handed_back_patch,
    success_result,
    unknown_job_row,
)
from autoflow_worker.recording.pool import Connection
from autoflow_worker.recording.statements import INSERT, LOCKED, LOOK, UPDATE_MANY

#: Errors that may pass: a time limit, or a conflict of two transactions.
_MAY_PASS: Final = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.QueryCanceled,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.SerializationFailure,
)
_LEFT: Final = "PostgreSQL leaves {what} out without an error: a trigger or a row-level policy"


async def fault_of_writing(
    connection: Connection, queue: str, *, new_rows: bool, patience: float
) -> str | None:
    """Insert a row, and let it become active, completed, failed and delayed; then undo all of it.

    Args:
        connection: in autocommit mode.
        queue: whose row it is.
        new_rows: whether the worker inserts rows; if not, an update of no row shows the rights.
        patience: seconds for a lock; a statement has twice as long.

    Returns:
        What was refused, and why; None if nothing was. Never what a row holds.

    Raises:
        DatabaseUnavailableError: the table is locked, or the server too slow.
        psycopg.OperationalError: the connection is lost.
    """
    row_id = f"autoflow-probe-{secrets.token_hex(16)}"
    statements = _statements(row_id, queue, new_rows=new_rows)
    await connection.execute("BEGIN")
    fault = await _first_fault(connection, statements, patience, new_rows=new_rows)
    await connection.execute("ROLLBACK")
    return fault


async def _first_fault(
    connection: Connection,
    statements: Iterable[tuple[str, str, object]],
    patience: float,
    *,
    new_rows: bool,
) -> str | None:
    cursor = psycopg.AsyncRawCursor(connection)
    # The lock's timeout is shorter, because its message says more.
    for setting, seconds in {"lock_timeout": patience, "statement_timeout": 2 * patience}.items():
        milliseconds = str(max(1, int(seconds * 1000)))
        await cursor.execute("SELECT set_config($1, $2, true)", (setting, milliseconds))
    for what, statement, parameter in statements:
        try:
            await cursor.execute(statement.encode(), (json.dumps(parameter),))
        except _MAY_PASS as error:
            reason = error.diag.message_primary
            raise DatabaseUnavailableError(
                f"PostgreSQL does not take {what} within {patience:g} s: {reason}"
            ) from None
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            # Not the whole text: its DETAIL holds the row.
            return f"PostgreSQL refuses {what}: {error.diag.message_primary}"
        if new_rows and cursor.rowcount == 0:
            return _LEFT.format(what=what)
    return None


def _statements(row_id: str, queue: str, *, new_rows: bool) -> Iterator[tuple[str, str, object]]:
    """Yield what to try: its description, the recorder's statement, and the parameter."""
    if new_rows:
        words = "the row of a job that has none (RECORD_UNKNOWN_JOBS=false: it gets none)"
        row = unknown_job_row(queue, data={}, options={}, timestamp=None)
        yield words, INSERT, [{"id": row_id, "data": row}]
    for status, patch in _patches().items():
        write = {"id": row_id, "queue": queue, "patch": patch, "settles": False}
        yield f"a row's status {status!r}", UPDATE_MANY, [write]
    if new_rows:
        yield "a look at a row", LOOK, [row_id]
    else:
        yield "a search for locked rows", LOCKED, [row_id]


def _patches() -> Mapping[str, Record]:
    now = now_ms()
    error = error_record("a probe of autoflow-worker", now)
    return {
        "active": active_patch(now_ms=now, attempt=1),
        "delayed": delayed_patch(until_ms=now, attempt=1, error=error),
        "failed": failed_patch(now_ms=now, attempt=1, error=error),
        "completed": completed_patch(now_ms=now, result=success_result(None, 0)),
        "pending": handed_back_patch(),
    }
