"""``worker_on_embedded_servers``: the whole worker in a test, on real servers out of wheels."""

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from autoflow_worker.errors import WorkerError
from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running
from autoflow_worker.recording.pool import Connection
from autoflow_worker.recording.table import connection_to, init_db
from autoflow_worker.scheduling.scheduler import TaskScheduler
from autoflow_worker.service import WorkerService
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import TaskDefinition

P = TypeVar("P")

PATIENCE: Final = 30.0
"""Seconds to connect to a server, and for a task to end."""

GRACE: Final = 5.0
"""Seconds that running jobs have to finish when the block ends."""

LOOK_EVERY: Final = 0.02
"""Seconds between two looks at a row."""

_CANCEL: Final = """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s"""
_ENDED: Final = {"completed", "failed", "cancelled"}
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class EmbeddedServers:
    """The URLs of an embedded Redis server and an embedded PostgreSQL server."""

    redis_url: str
    database_url: str


@contextmanager
def embedded_servers() -> Iterator[EmbeddedServers]:
    """Run a pair of servers until the end of the block, for any number of workers.

    Raises:
        MissingExtraError: the extra `embedded` is not installed.
        EmbeddedServerError: a server does not start.
    """
    with running(EmbeddedRedis()) as redis_url, running(EmbeddedPostgres()) as database_url:
        yield EmbeddedServers(redis_url, database_url)


class EmbeddedWorker:
    """A running worker; made by ``worker_on_embedded_servers``.

    Attributes:
        settings: the worker's settings, among them both URLs and BullMQ's key prefix.
        scheduler: an open ``TaskScheduler`` for the application under test.
    """

    def __init__(
        self, settings: Settings, scheduler: TaskScheduler, tasks: Sequence[TaskDefinition[Any]]
    ) -> None:
        self.settings = settings
        self.scheduler = scheduler
        self._service = service = WorkerService(settings, tasks)
        self._stop, self._abort = asyncio.Event(), asyncio.Event()
        self._worker = asyncio.create_task(service.run(self._stop, self._abort), name="the worker")

    async def schedule(
        self, task: TaskDefinition[P], payload: P | Mapping[str, object], **options: Any
    ) -> str:
        """Schedule a task and return its id; see ``TaskScheduler.schedule``."""
        return await self.scheduler.schedule(task, payload, **options)

    async def run(
        self, task: TaskDefinition[P], payload: P | Mapping[str, object], **options: Any
    ) -> dict[str, Any]:
        """Schedule a task, wait for its end, and return its row's ``data``."""
        return await self.until_ended(await self.schedule(task, payload, **options))

    async def row(self, task_id: str) -> dict[str, Any] | None:
        """Return the ``data`` of a task's row; ``None`` if there is no such row."""
        async with self._database() as connection:
            return await _row(connection, task_id)

    async def cancel(self, task_id: str) -> None:
        """Set a task's row to ``cancelled``; a running handler hears of it within two seconds."""
        async with self._database() as connection:
            await connection.execute(_CANCEL, (task_id,))

    async def until_ended(self, task_id: str, timeout: float = PATIENCE) -> dict[str, Any]:
        """Wait until a task is completed, failed or cancelled; return its row's ``data``.

        Args:
            timeout: seconds.

        Raises:
            TimeoutError: it has not ended by then; the message has the row.
            WorkerError: the worker has died.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        async with self._database() as connection:
            while True:
                row = await _row(connection, task_id)
                if row is not None and row["status"] in _ENDED:
                    return row
                if asyncio.get_running_loop().time() > deadline:
                    raise TimeoutError(f"{task_id} has not ended after {timeout:g} s: {row}")
                await self._pause()

    async def until_working(self) -> None:
        """Wait until every task takes jobs.

        Raises:
            WorkerError: the worker does not start.
        """
        while not self._service.is_working:
            await self._pause()

    async def stop(self, *, at_once: bool = False) -> None:
        """Stop the worker, after what runs or at once. May be called twice.

        Raises:
            WorkerError: a part of it had died.
        """
        self._stop.set()
        if at_once:
            self._abort.set()
        await self._worker

    async def _pause(self) -> None:
        ended, _ = await asyncio.wait({self._worker}, timeout=LOOK_EVERY)
        if ended:
            self._worker.result()
            raise WorkerError("the worker has stopped")

    def _database(self) -> AbstractAsyncContextManager[Connection]:
        # A connection for each question: psycopg's errors in the block are the application's own.
        url = self.settings.database_url.get_secret_value()
        return connection_to(url, PATIENCE, autocommit=True)


async def _row(connection: Connection, task_id: str) -> dict[str, Any] | None:
    cursor = await connection.execute("SELECT data FROM tasks WHERE id = %s", (task_id,))
    found = await cursor.fetchone()
    return None if found is None else found[0]


@asynccontextmanager
async def worker_on_embedded_servers(
    tasks: Sequence[TaskDefinition[Any]],
    *,
    servers: EmbeddedServers | None = None,
    **settings: Any,
) -> AsyncIterator[EmbeddedWorker]:
    """Run the worker in this process until the end of the block, on real Redis and PostgreSQL.

    It has a key prefix and a database of its own. Jobs that run at the end of the block have 5 s to
    finish, or none if the block raises.

    Args:
        tasks: the task list.
        servers: from ``embedded_servers``, to be shared; ``None``: servers of its own, which start
            in about a second.
        settings: more settings, by their names in lower case: ``worker_concurrency=10``. A task
            with ``run_in="process"`` needs ``tasks_config="module:attribute"``, which names the
            task list.

    Raises:
        MissingExtraError: the extra `embedded` is not installed.
        EmbeddedServerError: a server does not start.
        WorkerError: the worker does not start, or a part of it dies.
    """
    async with AsyncExitStack() as stack:
        if servers is None:
            starting = embedded_servers()
            servers = await asyncio.to_thread(starting.__enter__)
            stack.push_async_callback(asyncio.to_thread, starting.__exit__, None, None, None)
        name = f"test_{os.getpid()}_{next(_numbers)}"
        database_url = await stack.enter_async_context(_database(servers.database_url, name))
        given = {
            "worker_shutdown_grace": GRACE,
            "bullmq_prefix": name,
            **settings,
            "redis_url": servers.redis_url,
            "database_url": database_url,
        }
        loaded = Settings.load(**given)
        scheduler = await stack.enter_async_context(
            TaskScheduler(
                redis_url=servers.redis_url, database_url=database_url, prefix=loaded.bullmq_prefix
            )
        )
        worker = EmbeddedWorker(loaded, scheduler, tasks)
        try:
            await worker.until_working()
            yield worker
        except BaseException:
            # The block's own error is the one to see.
            with suppress(WorkerError):
                await worker.stop(at_once=True)
            raise
        await worker.stop()


@asynccontextmanager
async def _database(server_url: str, name: str) -> AsyncIterator[str]:
    """Make a database with the tasks table, and drop it at the end of the block."""
    async with connection_to(server_url, PATIENCE, autocommit=True) as server:
        await server.execute(f"CREATE DATABASE {name}".encode())
    try:
        url = urlsplit(server_url)._replace(path=f"/{name}").geturl()
        await init_db(url)
        yield url
    finally:
        async with connection_to(server_url, PATIENCE, autocommit=True) as server:
            await server.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())
