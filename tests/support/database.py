"""A test's database, with rows as the API inserts and reads them."""

import secrets
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from psycopg.types.json import Jsonb
from pydantic import ValidationError

from tests.support.row import TaskRow
from tests.support.until import PATIENCE, until

SCHEMA = files("autoflow_worker.recording").joinpath("schema.sql").read_text()
Connection = psycopg.AsyncConnection[tuple[Any, ...]]


def iso_now() -> str:
    """Return the time in the API's format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def other_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def create_database(server_url: str, name: str) -> str:
    """Create a database with the tasks table and return its URL."""
    async with await Connection.connect(server_url, autocommit=True) as connection:
        await connection.execute(
            psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name))
        )
    url = other_database(server_url, name)
    await reset_database(url)
    return url


async def reset_database(url: str) -> None:
    """Empty a database and create the table again. A clone of a template takes 30 times as long."""
    async with await Connection.connect(url, autocommit=True) as connection:
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.execute("DROP SCHEMA public CASCADE")
        await connection.execute("CREATE SCHEMA public")
        await connection.execute(SCHEMA)


async def check_rows(url: str) -> None:
    """Fail the test if the API's schema refuses a row."""
    async with await Connection.connect(url, autocommit=True) as connection:
        # The test may have dropped the table.
        found = await (await connection.execute("SELECT to_regclass('public.tasks')")).fetchone()
        if found is None or found[0] is None:
            return
        rows = await (await connection.execute("SELECT id, data FROM public.tasks")).fetchall()
    faults = []
    for row_id, data in rows:
        try:
            TaskRow.model_validate(data)
        except ValidationError as error:
            faults.append(f"{row_id}: {error}")
    assert not faults, "rows that the API refuses:\n" + "\n".join(faults[:10])


class Database:
    """A test's view of the tasks table.

    Attributes:
        url: the database's URL.
        connection: a connection in autocommit mode.
    """

    def __init__(self, url: str, connection: Connection) -> None:
        self.url = url
        self.connection = connection

    async def execute(self, query: str, *args: Any) -> int:
        """Run a statement; return how many rows it touched."""
        return (await self.connection.execute(query, args or None)).rowcount

    async def fetch(self, query: str, *args: Any) -> list[tuple[Any, ...]]:
        """Run a query; return its rows."""
        return await (await self.connection.execute(query, args or None)).fetchall()

    async def row(self, task_id: str) -> dict[str, Any] | None:
        """Return the `data` of a row; None if there is no row."""
        rows = await self.fetch("SELECT data FROM tasks WHERE id = %s", task_id)
        return rows[0][0] if rows else None

    async def rows(self) -> dict[str, dict[str, Any]]:
        """Return the `data` of every row, by id."""
        return dict(await self.fetch("SELECT id, data FROM tasks ORDER BY id"))

    async def task(self, task_id: str) -> TaskRow:
        """Return a row as the API reads it; the row must exist."""
        return TaskRow.model_validate(await self.row(task_id))

    async def status(self, task_id: str) -> str | None:
        """Return a row's status; None if there is no row."""
        return ((await self.row(task_id)) or {}).get("status")

    async def statuses(self) -> Counter[str]:
        """Return the number of rows by status."""
        return Counter(
            dict(await self.fetch("SELECT data->>'status', count(*) FROM tasks GROUP BY 1"))
        )

    async def until_status(
        self, task_id: str, *statuses: str, timeout: float = PATIENCE
    ) -> TaskRow:
        """Wait until a row has one of these statuses, and return it."""

        async def reached() -> bool:
            return await self.status(task_id) in statuses

        await until(reached, timeout, message=f"{task_id} to be {' or '.join(statuses)}")
        return await self.task(task_id)

    async def insert_task(
        self,
        queue: str,
        payload: Mapping[str, Any] | None = None,
        *,
        task_id: str | None = None,
        **changes: Any,
    ) -> str:
        """Insert a row as the API does before it enqueues; return its id.

        Args:
            queue: the task's and the queue's name.
            payload: without `correlationId`.
            task_id: 21 random characters if None.
            changes: other values for keys of the row, such as `maxAttempts=1`.
        """
        task_id = task_id or new_task_id()
        data = task_data(queue, payload or {}, **changes)
        await self.execute("INSERT INTO tasks (id, data) VALUES (%s, %s)", task_id, Jsonb(data))
        return task_id

    async def insert_tasks(
        self, queue: str, payloads: Mapping[str, Mapping[str, Any]], **changes: Any
    ) -> None:
        """Insert many rows, by id, with one COPY."""
        async with (
            self.connection.cursor() as cursor,
            cursor.copy("COPY tasks (id, data) FROM STDIN") as copy,
        ):
            for task_id, payload in payloads.items():
                await copy.write_row((task_id, Jsonb(task_data(queue, payload, **changes))))


@asynccontextmanager
async def open_database(url: str) -> AsyncIterator[Database]:
    """Connect to a database until the end of the block."""
    async with await Connection.connect(url, autocommit=True) as connection:
        yield Database(url, connection)


def new_task_id() -> str:
    """Return an id in the API's format: 21 characters of A-Z, a-z, 0-9, _ and -."""
    return secrets.token_urlsafe(16)[:21]


def task_data(queue: str, payload: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a new row's `data` as the API writes it."""
    data: dict[str, Any] = {
        "schemaVersion": 1,
        "taskName": queue,
        "queueName": queue,
        "payload": dict(payload),
        "status": "pending",
        "priority": "normal",
        "attempts": 0,
        "maxAttempts": 3,
        "enqueuedAt": iso_now(),
        "startedAt": None,
        "completedAt": None,
        "failedAt": None,
        "delayUntil": None,
        "result": None,
        "error": None,
        "userId": None,
        "externalId": None,
    }
    unknown = changes.keys() - data.keys()
    assert not unknown, f"no such keys in a row: {unknown}"
    return data | changes
