"""The statements that write the tasks table, and what PostgreSQL's refusals of them mean."""

import enum
from typing import Final

import psycopg

from autoflow_worker.encoding.masking import mask_secrets

LOCK_TIMEOUT: Final = "50ms"
"""How long a batch waits for somebody else's lock before the locked rows are put off."""

# A batch looks up each of its rows by primary key, whatever the planner believes of the table's
# size: a plan made for a small table would read all of a grown one for every batch. Reading rows is
# made dear, since large ones lie outside a table that then looks small.
_SETTINGS: Final = {
    "lock_timeout": LOCK_TIMEOUT,
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    "cpu_tuple_cost": "1",
}
SESSION: Final = "SELECT " + ", ".join(
    f"set_config('{name}', '{value}', false)" for name, value in _SETTINGS.items()
)

CONNECTION_DEFAULTS: Final = {
    "application_name": "autoflow-worker",
    "connect_timeout": 5,
    # A half-open connection is noticed by the kernel: a write is never cancelled half-way.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}

REFUSED: Final = (
    psycopg.errors.InvalidPassword,
    psycopg.errors.InvalidAuthorizationSpecification,
    psycopg.errors.InvalidCatalogName,
)
# libpq's errors while connecting carry no SQLSTATE, only the server's words.
WORDS_OF_REFUSAL: Final = (
    "authentication failed",
    "does not exist",
    "is not permitted to log in",
    "no password supplied",
    "pg_hba.conf",  # has no entry, or one that rejects
    "permission denied for database",
)


def is_refusal(error: BaseException) -> bool:
    """Whether PostgreSQL refuses the user, the password or the database's name: not an outage."""
    words = str(error)
    return isinstance(error, REFUSED) or (
        isinstance(error, psycopg.OperationalError)
        and error.sqlstate is None
        and any(refusal in words for refusal in WORDS_OF_REFUSAL)
    )


def may_be_for_good(error: BaseException) -> bool:
    """Whether waiting alone may not end this: a right or a table is gone, a constraint is there.

    A check like that at the start has to tell; one row may be refused for reasons of its own.
    """
    return is_refusal(error) or (
        isinstance(error, psycopg.Error)
        and not isinstance(
            error,
            psycopg.OperationalError
            | psycopg.InterfaceError
            | psycopg.errors.ReadOnlySqlTransaction,
        )
    )


class UnencodableError(ValueError):
    """A text that is no text, such as half a surrogate pair, can't be sent to PostgreSQL."""


class Blame(enum.Enum):
    """Whose fault it is that a statement failed."""

    CONTENT = "content"  # a patch holds what PostgreSQL can't store: it fails again and again
    ROW = "row"  # PostgreSQL refuses one row now; its patch may be written later, the others now
    SERVER = "server"  # nothing can be written now
    CODE = "code"  # this package's own, over one of the writes or over all of them


# By classes of SQLSTATE: data that can't be stored, and limits of the program.
_CONTENT_CLASSES: Final = frozenset({"22", "54"})
# Constraints (23), what triggers and their functions raise, a view's check, and damage.
_ROW_CLASSES: Final = frozenset({"09", "20", "21", "23", "2F", "38", "39", "44", "P0", "XX"})
# A policy or a missing right, and a statement that took too long.
_ROW_CODES: Final = frozenset({"42501", "57014"})


def blame(error: Exception) -> Blame:
    """Return whose fault an error is that came up while writes were on their way."""
    if isinstance(error, UnencodableError | UnicodeError):
        return Blame.CONTENT
    if isinstance(error, psycopg.Error):
        code = error.sqlstate or ""
        if code[:2] in _CONTENT_CLASSES:
            return Blame.CONTENT
        if code[:2] in _ROW_CLASSES or code in _ROW_CODES:
            return Blame.ROW
        # A statement that PostgreSQL can't work with is the table's, unless a trigger has it.
        return Blame.ROW if code[:2] == "42" and error.diag.context else Blame.SERVER
    return Blame.SERVER if isinstance(error, OSError) else Blame.CODE


def reason_of(error: Exception) -> str:
    """Return an error in words, without what the server quotes from the row.

    The text of a psycopg error holds DETAIL, which lists all columns of the row, and CONTEXT, which
    quotes JSON.
    """
    if isinstance(error, psycopg.Error):
        reason = error.diag.message_primary or str(error)
        if (error.sqlstate or "").startswith("22"):
            reason = reason.partition(': "')[0]  # what follows is the value
    elif isinstance(error, UnencodableError):
        reason = str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return mask_secrets(reason.strip()) or type(error).__name__


def facts_of(error: Exception) -> dict[str, str | None]:
    """Return what a log line says of an error: the reason, the SQLSTATE and the constraint."""
    facts: dict[str, str | None] = {"reason": reason_of(error)}
    if isinstance(error, psycopg.Error):
        facts |= {"sqlstate": error.sqlstate, "constraint": error.diag.constraint_name}
    return facts


CONFLICTS: Final = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

# `data || patch` merges at the top level and keeps the API's other keys. The conditions are the
# rules that no write may break: another queue's row is not ours; `since`: a start never goes
# behind a later start; `fence`: an outcome goes only into the row that still shows its own start;
# a cancelled task stays cancelled, unless its work was done after all (`settles`); `unfinished`:
# what is said of a job whose data Redis has lost goes only into a row that tells no end yet.
_UPDATE: Final = """
UPDATE tasks AS t
SET data = t.data || p.patch, updated_at = timezone('utc', now())
FROM {patches} AS p{columns}
WHERE {relaxed}t.id = p.id
  AND jsonb_typeof(t.data) = 'object'
  AND coalesce(t.data->>'queueName', p.queue) = p.queue
  AND (p.since IS NULL OR coalesce(t.data->>'startedAt', '') <= p.since COLLATE "C")
  AND (p.fence IS NULL OR t.data->>'startedAt' = p.fence)
  AND (p.settles OR t.data->>'status' IS DISTINCT FROM 'cancelled')
  AND (p.unfinished IS NULL OR coalesce(t.data->>'status', '') NOT IN ('completed', 'failed'))
RETURNING t.id
"""
_MANY: Final = {
    "patches": "json_to_recordset($1::json)",
    "columns": "(id text, queue text, patch jsonb, since text, fence text, settles boolean,"
    " unfinished boolean)",
}
# The same for one patch, which PostgreSQL needs a tenth less time for.
_ONE: Final = {
    "patches": "(SELECT $1::text, $2::text, $3::jsonb, $4::text, $5::text, $6::boolean,"
    " $7::boolean)",
    "columns": "(id, queue, patch, since, fence, settles, unfinished)",
}
# A start that a crash of PostgreSQL loses is made good by its outcome, so it needn't wait for the
# disk. Set inside the statement, it holds for this one transaction and needs no round trip.
_RELAXED: Final = "(SELECT set_config('synchronous_commit', 'off', true)) = 'off' AND "

UPDATE_MANY: Final = _UPDATE.format(relaxed="", **_MANY)
UPDATE_MANY_RELAXED: Final = _UPDATE.format(relaxed=_RELAXED, **_MANY)
UPDATE_ONE: Final = _UPDATE.format(relaxed="", **_ONE)
UPDATE_ONE_RELAXED: Final = _UPDATE.format(relaxed=_RELAXED, **_ONE)
INSERT: Final = """
INSERT INTO tasks (id, data, created_at, updated_at)
SELECT p.id, p.data, timezone('utc', now()), timezone('utc', now())
FROM json_to_recordset($1::json) AS p(id text, data jsonb)
ON CONFLICT (id) DO NOTHING
"""
# These two take a list of ids.
LOCKED: Final = """
WITH wanted AS MATERIALIZED (SELECT json_array_elements_text($1::json) AS id),
free AS MATERIALIZED (
  SELECT id FROM tasks WHERE id = ANY(ARRAY(SELECT id FROM wanted)) FOR NO KEY UPDATE SKIP LOCKED)
SELECT id FROM tasks WHERE id = ANY(ARRAY(SELECT id FROM wanted)) EXCEPT SELECT id FROM free
"""
# Whether somebody has, or waits for, a lock of the table that no row can be written beside: an
# index that is built, a migration. Who waits for one is before us, too.
TABLE_LOCKED: Final = """
SELECT FROM pg_locks
WHERE relation = to_regclass('tasks') AND pid <> pg_backend_pid()
  AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
  AND mode IN ('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
LIMIT 1
"""
LOOK: Final = """
SELECT id, jsonb_typeof(data), data->>'queueName', data->>'status', data->>'startedAt'
FROM tasks WHERE id = ANY(ARRAY(SELECT json_array_elements_text($1::json)))
"""
