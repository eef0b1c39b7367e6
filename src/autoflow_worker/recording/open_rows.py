"""Rows that are not finished: `reconcile` reads them, and writes those that did not change."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psycopg

from autoflow_worker.encoding.failures import shorten_reason
from autoflow_worker.recording import patches
from autoflow_worker.recording.pool import Connection

OPEN: Final = ("pending", "active", "delayed")  # the statuses of rows that are not finished

_COMPARED: Final = """
SELECT id, data->>'queueName', data->>'status', data->>'startedAt', data->>'attempts', xmin::text
FROM tasks WHERE
"""
_OPEN_ROWS: Final = f"{_COMPARED} data->>'status' = ANY(%s) AND id > %s ORDER BY id LIMIT %s"
_ROWS: Final = f"{_COMPARED} id = ANY(%s) ORDER BY id"
# `xmin` changes with each write: a worker or the API may have written the row since.
_IS_UNCHANGED: Final = "SELECT FROM tasks WHERE id = %s AND xmin::text = %s"
# Wait neither for the disk, as `reconcile` can be run again, nor long for another session's lock.
# Both settings hold for this one statement.
_WRITE: Final = """
UPDATE tasks SET data = data || %s::jsonb, updated_at = timezone('utc', now())
WHERE id = %s AND xmin::text = %s
  AND (SELECT set_config('synchronous_commit', 'off', true)) = 'off'
  AND (SELECT set_config('lock_timeout', '2s', true)) = '2s'
"""
_TASK: Final = """
SELECT (data->'payload')::text, data->>'priority', data->>'maxAttempts', data->>'delayUntil'
FROM tasks WHERE id = %s AND xmin::text = %s
"""


class RowChangedError(Exception):
    """The row is not as it was when it was read."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is compared of a row; the keys of its `data` as text, None where they are missing.

    Attributes:
        version: changes with every write of the row.
    """

    id: str
    queue: str | None
    status: str
    started_at: str | None
    attempts: str | None
    version: str


@dataclass(frozen=True, slots=True)
class Task:
    """What a job is made from again; the keys of the row's `data` as text."""

    payload: str | None
    priority: str | None
    max_attempts: str | None
    delay_until: str | None


class OpenRows:
    """Reads and changes rows, one statement at a time.

    Each method raises `psycopg.Error` if the connection is lost; those that take a `Row` raise
    `RowChangedError` if it has changed, and have written nothing then.

    Args:
        connection: in autocommit mode; the caller closes it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def after(self, row_id: str, limit: int) -> list[Row]:
        """The first rows behind an id that are not finished, by their ids."""
        return await self._read(_OPEN_ROWS, list(OPEN), row_id, limit)

    async def these(self, row_ids: list[str]) -> list[Row]:
        """The rows with these ids, by their ids."""
        return await self._read(_ROWS, row_ids)

    async def task(self, row: Row) -> Task:
        """What the row's job was made from."""
        return Task(*await self._fetch(_TASK, row))

    async def make_sure(self, row: Row) -> None:
        """See that the row is as it was."""
        await self._fetch(_IS_UNCHANGED, row)

    async def write(self, row: Row, patch: Mapping[str, Any]) -> str | None:
        """Merge a patch into the row; why it was refused, None if it was not."""
        parameters = patches.encode(dict(patch)), row.id, row.version
        try:
            cursor = await self._connection.execute(_WRITE.encode(), parameters)
        except psycopg.Error as error:
            if self._connection.closed:
                raise
            # Its own words alone: the detail shows the row's contents.
            words = error.diag.message_primary or type(error).__name__
            return f"PostgreSQL refuses the change: {shorten_reason(words)}"
        if cursor.rowcount == 0:
            await self.make_sure(row)
            return "PostgreSQL leaves the row as it is: a trigger or a policy"
        return None

    async def _fetch(self, query: str, row: Row) -> tuple[Any, ...]:
        cursor = await self._connection.execute(query.encode(), (row.id, row.version))
        found: tuple[Any, ...] | None = await cursor.fetchone()
        if found is None:
            raise RowChangedError
        return found

    async def _read(self, query: str, *args: object) -> list[Row]:
        cursor = await self._connection.execute(query.encode(), args)
        return [Row(*values) for values in await cursor.fetchall()]
