"""Rows of new tasks: what the producing side writes into the tasks table."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from autoflow_worker.encoding.masking import mask_secrets
from autoflow_worker.errors import DatabaseUnavailableError, DatabaseUnfitError
from autoflow_worker.recording import patches

PATIENCE: Final = 5.0
"""Seconds for which a server that went away is tried again, in each step of scheduling."""

RETRY_PAUSE: Final = 0.05
"""Seconds before the second try; doubled from there."""

# Each of these may be run twice: a statement whose reply got lost is simply sent again.
_INSERT: Final = """
INSERT INTO tasks (id, data, created_at, updated_at)
VALUES (%s, %s::jsonb, timezone('utc', now()), timezone('utc', now()))
ON CONFLICT (id) DO NOTHING
"""
_MERGE: Final = """
UPDATE tasks SET data = data || %s::jsonb, updated_at = timezone('utc', now()) WHERE id = %s
"""
_MERGE_UNLESS_STARTED: Final = _MERGE + "AND data->>'startedAt' IS NULL"


class NewRows:
    """Writes rows one by one, over one connection that is made again when it broke.

    Each method raises `DatabaseUnavailableError` if PostgreSQL is away for `PATIENCE` seconds, and
    `DatabaseUnfitError` if it refuses what is asked.

    Args:
        url: libpq's connection URL.
    """

    def __init__(self, url: str) -> None:
        options = {"application_name": "autoflow-worker", "tcp_user_timeout": 30_000}
        self._options: dict[str, Any] = {**options, **conninfo_to_dict(url)}
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._turn = asyncio.Lock()

    async def open(self, timeout: float) -> None:
        """Connect for the first time, once: a wrong URL is told at once.

        Args:
            timeout: seconds.
        """
        try:
            await self._connect(timeout)
        except psycopg.Error as error:
            reason = f"PostgreSQL can't be reached: {_text(error)}"
            raise DatabaseUnavailableError(reason) from None

    async def close(self) -> None:
        """Disconnect. May be called twice."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def insert(self, row_id: str, data: Mapping[str, Any]) -> None:
        """Insert a row."""
        await self._execute(_INSERT, row_id, patches.encode(dict(data)))

    async def merge(self, row_id: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch into a row's data."""
        await self._execute(_MERGE, patches.encode(dict(patch)), row_id)

    async def merge_unless_started(self, row_id: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch, but leave a row alone that a worker has written into."""
        await self._execute(_MERGE_UNLESS_STARTED, patches.encode(dict(patch)), row_id)

    async def _execute(self, statement: str, *args: object) -> None:
        loop = asyncio.get_running_loop()
        async with self._turn:
            deadline = loop.time() + PATIENCE
            pause = RETRY_PAUSE
            while True:
                try:
                    connection = self._connection or await self._connect(PATIENCE)
                    await connection.execute(statement.encode(), args)
                except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                    await self.close()
                    if loop.time() + pause > deadline:
                        reason = f"PostgreSQL went away: {_text(error)}"
                        raise DatabaseUnavailableError(reason) from None
                    await asyncio.sleep(pause)
                    pause *= 2
                except psycopg.Error as error:
                    reason = f"PostgreSQL refuses the row: {_text(error)}"
                    raise DatabaseUnfitError(reason) from None
                else:
                    return

    async def _connect(self, timeout: float) -> psycopg.AsyncConnection[Any]:
        options = {"connect_timeout": max(2, round(timeout)), **self._options}
        self._connection = await psycopg.AsyncConnection.connect(
            make_conninfo("", **options), autocommit=True
        )
        return self._connection


def _text(error: psycopg.Error) -> str:
    return mask_secrets(" ".join(str(error).split())) or type(error).__name__
