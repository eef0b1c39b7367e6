"""Rows of new tasks: what the producing side writes into the tasks table."""

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import psycopg

from autoflow_worker.errors import DatabaseUnavailableError, DatabaseUnfitError
from autoflow_worker.pauses import Pauses
from autoflow_worker.recording import patches
from autoflow_worker.recording.faults import reason_of
from autoflow_worker.recording.pool import Pool

PATIENCE: Final = 5.0
"""Seconds for which a server that went away is tried again, in each step of scheduling."""

RETRY_PAUSE: Final = 0.05  # seconds before the second try; doubled from there
RETRY_PAUSE_MAX: Final = 2.0

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
    """Writes rows one by one, over a single connection, for which the callers wait in turn.

    Each method raises `DatabaseUnavailableError` if PostgreSQL is away for `PATIENCE` seconds, and
    `DatabaseUnfitError` if it refuses what is asked.
    """

    def __init__(self, url: str) -> None:
        self._pool = Pool(url, 1)

    async def open(self, timeout: float) -> None:
        """Connect for the first time, as `Pool.open` does."""
        await self._pool.open(timeout)

    async def close(self) -> None:
        """Disconnect. May be called twice."""
        await self._pool.close()

    async def insert(self, row_id: str, data: Mapping[str, Any]) -> None:
        await self._execute(_INSERT, row_id, patches.encode(dict(data)))

    async def merge(self, row_id: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch into a row's data."""
        await self._execute(_MERGE, patches.encode(dict(patch)), row_id)

    async def merge_unless_started(self, row_id: str, patch: Mapping[str, Any]) -> None:
        """Merge a patch, but leave a row alone that a worker has written into."""
        await self._execute(_MERGE_UNLESS_STARTED, patches.encode(dict(patch)), row_id)

    async def _execute(self, statement: str, *args: object) -> None:
        time = asyncio.get_running_loop().time
        pauses = Pauses(RETRY_PAUSE, RETRY_PAUSE_MAX)
        away_since: float | None = None
        while True:
            try:
                async with self._pool.connection() as connection:
                    await connection.execute(statement.encode(), args)
            except (psycopg.OperationalError, psycopg.InterfaceError) as error:
                # Waiting for a turn is no outage, so the time counts from the first failure.
                away_since = away_since or time()
                pause = pauses.take()
                if time() + pause > away_since + PATIENCE:
                    reason = f"PostgreSQL went away: {reason_of(error)}"
                    raise DatabaseUnavailableError(reason) from None
                await asyncio.sleep(pause)
            except psycopg.Error as error:
                reason = f"PostgreSQL refuses the row: {reason_of(error)}"
                raise DatabaseUnfitError(reason) from None
            else:
                return
