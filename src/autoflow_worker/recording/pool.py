"""Connections to PostgreSQL: how each is made, and the pool of those that a process keeps.

Every connection of this package is made with the settings of `conninfo`.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from autoflow_worker.errors import DatabaseUnavailableError
from autoflow_worker.outage import Silence
from autoflow_worker.recording.faults import is_refusal, reason_of
from autoflow_worker.recording.link import PostgresLink
from autoflow_worker.recording.statements import SESSION

CONNECT_TIMEOUT: Final = 5.0
"""Seconds that one attempt to connect may take."""

# Seconds for which the pool itself repeats a failed attempt, at most one second apart.
RECONNECT_TIMEOUT: Final = 2.0

CLOSE_PATIENCE: Final = 1.0  # seconds that closing the pool waits for an attempt to connect

Connection = psycopg.AsyncConnection[Any]


def conninfo(url: str, timeout: float = CONNECT_TIMEOUT) -> str:
    """Return the settings of a connection: the URL's own, and defaults for the others.

    The recorder's session settings are not among them. They would travel as libpq's `options`,
    which PgBouncer refuses in session mode as well. So the recorder sends them as a statement, and
    a start refuses PgBouncer's other modes before that (`pooler`).

    Args:
        timeout: seconds for one attempt to connect.
    """
    settings: dict[str, Any] = {
        "application_name": "autoflow-worker",
        "connect_timeout": max(2, round(timeout)),
        # The kernel notices a half-open connection, so a write is never cancelled half-way.
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
        "tcp_user_timeout": 30_000,
        **conninfo_to_dict(url),
        "client_encoding": "UTF8",
    }
    return make_conninfo("", **settings)


class Pool:
    """The PostgreSQL connections of a process, made on demand and replaced when they break.

    A `psycopg_pool` only logs why it can't connect. This one tells those who wait.

    Args:
        size: connections at most.

    Attributes:
        failure: why the last attempt to connect that failed did so; None if none did.
    """

    def __init__(self, url: str, size: int) -> None:
        self._conninfo = conninfo(url)
        self._size = size
        self._pool = self._new()
        self._waiting: set[asyncio.Timeout] = set()
        self.failure: Exception | None = None
        # psycopg_pool logs each attempt and each checkout. The users of the connections log what an
        # operator must know. If an application has set this logger's level, it stays.
        logger = logging.getLogger("psycopg.pool")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)

    def _new(self) -> AsyncConnectionPool[Connection]:
        note = self._note

        class Noted(psycopg.AsyncConnection[Any]):
            @classmethod
            async def connect(cls, conninfo: str = "", **options: Any) -> Self:
                try:
                    return await super().connect(conninfo, **options)
                except Exception as error:
                    note(error)
                    raise

        return AsyncConnectionPool(
            self._conninfo,
            connection_class=Noted,
            kwargs={"autocommit": True},
            min_size=0,
            max_size=self._size,
            reconnect_timeout=RECONNECT_TIMEOUT,
            open=False,
        )

    def _note(self, failure: Exception) -> None:
        self.failure = failure
        waiting, self._waiting = self._waiting, set()
        for each in waiting:
            each.reschedule(asyncio.get_running_loop().time())

    async def open(self, timeout: float) -> None:
        """Make the first connection. May be called again after `close`.

        Raises:
            DatabaseUnavailableError: PostgreSQL can't be reached in `timeout` seconds, or refuses
                the user, the password or the database's name.
        """
        self._pool = self._new()  # psycopg's own can't be opened again
        await self._pool.open()
        try:
            async with asyncio.timeout(timeout):
                await self._reach()
        except BaseException as error:
            await self.close()
            if not isinstance(error, TimeoutError):
                raise
            reason = "it gives no answer" if self.failure is None else reason_of(self.failure)
            raise DatabaseUnavailableError(
                f"PostgreSQL can't be reached within {timeout:g} s: {reason}"
            ) from None

    async def _reach(self) -> None:
        while True:
            try:
                async with self.connection():
                    return
            except psycopg.Error as error:
                if is_refusal(error):
                    reason = f"PostgreSQL refuses the connection: {reason_of(error)}"
                    raise DatabaseUnavailableError(reason) from None

    async def close(self) -> None:
        """Disconnect. May be called twice; connections that are out close when they come back."""
        await self._pool.close(CLOSE_PATIENCE)

    async def take(self) -> Connection:
        """Check a connection out, in autocommit mode; wait while others have them all.

        Raises:
            psycopg.Error: an attempt to connect failed meanwhile. The pool goes on trying.
        """
        try:
            async with asyncio.timeout(None) as waiting:
                self._waiting.add(waiting)
                while True:
                    # Asking anew lets the pool grow that gave up an attempt.
                    with suppress(PoolTimeout):
                        return await self._pool.getconn(RECONNECT_TIMEOUT)
        except TimeoutError:
            assert self.failure is not None
            raise self.failure.with_traceback(None) from None
        finally:
            self._waiting.discard(waiting)

    async def put_back(self, connection: Connection) -> None:
        """Return a connection; the pool replaces one that is closed."""
        await self._pool.putconn(connection)

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[Connection]:
        """Check a connection out for the length of the block; raises as `take`."""
        connection = await self.take()
        try:
            yield connection
        finally:
            await self.put_back(connection)


class Checkout:
    """A connection that is checked out once, and kept behind a link until it breaks."""

    def __init__(self, pool: Pool, silence: Silence) -> None:
        self._pool = pool
        self._silence = silence
        self._link: PostgresLink | None = None

    async def link(self) -> PostgresLink:
        """Return the link to the connection, with the recorder's session settings.

        Raises:
            psycopg.Error: an attempt to connect failed.
        """
        if self._link is None:
            connection = await self._pool.take()
            try:
                self._link = PostgresLink(connection, self._silence)
                # Not by psycopg: cancelled at a server that hangs, psycopg would ask the server for
                # seconds to stop.
                await self._link.execute(SESSION)
            except Exception:
                await self.close()
                await self._pool.put_back(connection)
                raise
        return self._link

    async def replace(self) -> None:
        """Close the connection, and let the pool make another."""
        link = self._link
        await self.close()
        if link is not None:
            await self._pool.put_back(link.connection)

    async def close(self) -> None:
        """Close the connection, for good. May be called twice."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()
