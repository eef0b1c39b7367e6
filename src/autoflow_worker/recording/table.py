"""The tasks table as a whole: create it if it is missing, and examine it before a start.

Each function makes a connection of its own, before or instead of a running worker.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from importlib.resources import files

import psycopg
from psycopg.rows import TupleRow

from autoflow_worker.errors import (
    DatabaseRefusedError,
    DatabaseUnavailableError,
    DatabaseUnfitError,
)
from autoflow_worker.recording.faults import is_refusal, reason_of
from autoflow_worker.recording.pool import CONNECT_TIMEOUT, Connection, connect
from autoflow_worker.recording.pooler import shares_sessions
from autoflow_worker.recording.row_probe import fault_of_writing

#: The recorder uses MATERIALIZED, which PostgreSQL has since version 12.
MIN_SERVER_VERSION = 120_000

#: The queue of the row that is written and undone, if there is no task list.
PROBED_QUEUE = "autoflow-probe"

#: The columns that the API creates (contract, section 2), and what else does as well.
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
        url: libpq's connection URL.
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
                    fault = await fault_of_writing(
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
            connection = await connect(url, timeout=patience, autocommit=autocommit)
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
