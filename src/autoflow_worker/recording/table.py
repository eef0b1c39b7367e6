"""The tasks table as a whole: create it if it is missing, and examine it before a start.

Each function makes a connection of its own, before or instead of a running worker.
"""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files

import psycopg
from psycopg.rows import TupleRow

from autoflow_worker.clock import now_ms
from autoflow_worker.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseUnfitError,
)
from autoflow_worker.recording import patches
from autoflow_worker.recording.faults import CONFLICTS, is_refusal, reason_of
from autoflow_worker.recording.pool import CONNECT_TIMEOUT, Connection, conninfo
from autoflow_worker.recording.pooler import shares_sessions
from autoflow_worker.recording.statements import INSERT, LOCKED, LOOK, UPDATE_MANY

MIN_SERVER_VERSION = 120_000  # the recorder uses MATERIALIZED, which version 12 brought

PROBED_QUEUE = "autoflow-probe"
"""The queue of the row that is written and undone, if there is no task list."""

# The columns that the API creates (contract, section 2), and what else does as well.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("text", "character varying"),
    "data": ("jsonb",),
    "created_at": ("timestamp without time zone",),
    "updated_at": ("timestamp without time zone",),
}
_POOLER = (
    "PostgreSQL is behind a pooler that deals its sessions out for each transaction (PgBouncer in "
    "transaction or statement mode): DATABASE_URL must name a pool in session mode, or PostgreSQL"
)
_WAY_OUT = "run the API's migrations, or `autoflow-worker init-db`"

_LEFT = "PostgreSQL leaves {what} out without an error: a trigger or a row-level policy"
# A time limit, or a conflict of two transactions.
_MAY_PASS = (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled, *CONFLICTS)

_DESCRIBE = """
SELECT current_setting('server_version'), current_setting('server_version_num')::int,
       current_setting('server_encoding'),
       pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool,
       c.oid::regclass::text, c.relkind,
       array_remove(ARRAY[
         CASE WHEN NOT has_table_privilege(c.oid, 'SELECT') THEN 'SELECT' END,
         CASE WHEN NOT has_table_privilege(c.oid, 'INSERT') THEN 'INSERT' END,
         CASE WHEN NOT has_table_privilege(c.oid, 'UPDATE') THEN 'UPDATE' END], NULL),
       EXISTS (
         SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname = 'id'
         WHERE i.indrelid = c.oid AND i.indisunique AND i.indpred IS NULL
           AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum)
FROM (VALUES (to_regclass('tasks'))) AS t(oid) LEFT JOIN pg_class c ON c.oid = t.oid
"""
_COLUMN_TYPES = """
SELECT attname, format_type(atttypid, NULL) FROM pg_attribute
WHERE attrelid = to_regclass('tasks') AND attnum > 0 AND NOT attisdropped
"""


async def init_db(url: str, *, patience: float = CONNECT_TIMEOUT) -> None:
    """Create the tasks table and its indexes where they are missing; change nothing that is there.

    Raises:
        DatabaseUnavailableError: PostgreSQL can't be reached.
        DatabaseUnfitError: it refuses to create them.
    """
    statements = (
        files("autoflow_worker.recording").joinpath("schema.sql").read_text(encoding="utf-8")
    )
    async with connection_to(url, patience) as connection:
        # IF NOT EXISTS does not keep two of these from colliding.
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtext('autoflow-worker init-db'))"
        )
        await connection.execute(statements.encode())


async def inspect_tasks_table(
    url: str,
    *,
    queue: str = PROBED_QUEUE,
    new_rows: bool = True,
    patience: float = CONNECT_TIMEOUT,
) -> str:
    """Check that a worker can keep its statuses there, and return the server's version.

    Args:
        queue: whose row is written, and undone.
        new_rows: whether the worker inserts rows, too (RECORD_UNKNOWN_JOBS).
        patience: seconds to wait for the connection, and for a lock; four times as long for all.

    Raises:
        DatabaseUnavailableError: PostgreSQL can't be reached, or the table is locked.
        DatabaseUnfitError: it is too old or read-only, or behind a pooler that mixes sessions; or
            the table is missing, of another shape, or does not take what is recorded. The message
            names all of it.
    """
    async with connection_to(url, patience, autocommit=True) as connection:
        try:
            async with asyncio.timeout(4 * patience):
                if await shares_sessions(connection, url):
                    raise DatabaseUnfitError(_POOLER)
                described = await (await connection.execute(_DESCRIBE)).fetchone()
                types = dict(await (await connection.execute(_COLUMN_TYPES)).fetchall())
                if described is None:
                    raise DatabaseUnfitError("PostgreSQL did not describe itself")
                version, faults = _faults(described, types, new_rows=new_rows)
                if not faults:
                    fault = await _fault_of_writing(
                        connection, queue, new_rows=new_rows, patience=patience
                    )
                    faults = [fault] if fault else []
        except TimeoutError:
            reason = f"PostgreSQL gave no answer in {4 * patience:g} s"
            raise DatabaseUnavailableError(reason) from None
    if faults:
        raise DatabaseUnfitError("; ".join(faults))
    return version


def _faults(
    described: TupleRow, types: Mapping[str, str], *, new_rows: bool
) -> tuple[str, list[str]]:
    version, number, encoding, read_only, table, kind, missing_privileges, id_is_unique = described
    faults = []
    if number < MIN_SERVER_VERSION:
        faults.append(f"PostgreSQL {version} is too old: {MIN_SERVER_VERSION // 10_000} is needed")
    if encoding != "UTF8":
        faults.append(
            f"the database's encoding is {encoding}, which can't hold every text: it has to be UTF8"
        )
    if read_only:
        faults.append("PostgreSQL is read-only (a standby?): DATABASE_URL must name the primary")
    if table is None:
        faults.append(f"there is no table 'tasks': {_WAY_OUT}")
        return version, faults
    if kind not in {"r", "p"}:
        faults.append(f"{table} is not a table")
    for name, wanted in COLUMNS.items():
        if name not in types:
            faults.append(f"{table} has no column {name}")
        elif types[name] not in wanted:
            faults.append(f"{table}.{name} is of type {types[name]} and has to be {wanted[0]}")
    if "id" in types and not id_is_unique:
        faults.append(f"{table}.id has to be the primary key")
    if lacking := [name for name in missing_privileges if new_rows or name != "INSERT"]:
        faults.append(f"the user lacks {', '.join(lacking)} on {table}")
    return version, faults


@asynccontextmanager
async def connection_to(
    url: str, patience: float, *, autocommit: bool = False
) -> AsyncIterator[Connection]:
    """Connect, and raise psycopg's errors as errors of this package.

    Raises:
        DatabaseUnavailableError: PostgreSQL can't be reached, or goes away.
        DatabaseRefusedError: it refuses the user, the password or the database's name.
        DatabaseUnfitError: it refuses what it is asked for.
    """
    try:
        async with asyncio.timeout(patience):
            connection = await psycopg.AsyncConnection.connect(
                conninfo(url, patience), autocommit=autocommit
            )
    except TimeoutError:
        raise DatabaseUnavailableError(
            f"PostgreSQL can't be reached: it gave no answer in {patience:g} s"
        ) from None
    except psycopg.Error as error:
        if is_refusal(error):
            reason = f"PostgreSQL refuses the connection: {reason_of(error)}"
            raise DatabaseRefusedError(reason) from None
        raise DatabaseUnavailableError(f"PostgreSQL can't be reached: {reason_of(error)}") from None
    try:
        async with connection:
            yield connection
    except psycopg.OperationalError as error:
        raise DatabaseUnavailableError(f"PostgreSQL went away: {reason_of(error)}") from None
    except psycopg.Error as error:
        raise DatabaseUnfitError(f"PostgreSQL refused: {reason_of(error)}") from None


async def _fault_of_writing(
    connection: Connection, queue: str, *, new_rows: bool, patience: float
) -> str | None:
    """Insert a row, and let it become active, completed, failed and delayed; then undo all of it.

    The statements are the recorder's own. So columns without a default, constraints, triggers,
    policies and missing rights all show.

    Args:
        new_rows: whether the worker inserts rows; if not, an update of no row shows the rights.
        patience: seconds for a lock; a statement has twice as long.

    Returns:
        What was refused, and why; None if nothing was. Never what a row holds.

    Raises:
        DatabaseUnavailableError: the table is locked, or the server too slow.
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
        row = patches.unknown_job_row(queue, data={}, options={}, timestamp=None)
        yield words, INSERT, [{"id": row_id, "data": row}]
    for status, patch in _probes().items():
        write = {"id": row_id, "queue": queue, "patch": patch, "settles": False}
        yield f"a row's status {status!r}", UPDATE_MANY, [write]
    if new_rows:
        yield "a look at a row", LOOK, [row_id]
    else:
        yield "a search for locked rows", LOCKED, [row_id]


def _probes() -> Mapping[str, patches.Record]:
    now = now_ms()
    error = patches.error_record("a probe of autoflow-worker", now)
    return {
        "active": patches.active_patch(now_ms=now, attempt=1),
        "delayed": patches.delayed_patch(until_ms=now, attempt=1, error=error),
        "failed": patches.failed_patch(now_ms=now, attempt=1, error=error),
        "completed": patches.completed_patch(now_ms=now, result=patches.success_result(None, 0)),
        "pending": patches.handed_back_patch(),
    }
