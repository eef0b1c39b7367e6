"""A connection to PostgreSQL whose statements cost little of the event loop's time.

psycopg adds the socket to the event loop for each statement and removes it again, which takes a
dozen system calls. A `PostgresLink` watches the socket as long as the connection lives. psycopg
still connects, and its libpq and its exceptions are used.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Final

import psycopg
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus
from psycopg.pq.abc import PGresult

from autoflow_worker.outage import SILENT_AFTER, Silence

WATCH_INTERVAL: Final = 1.0  # seconds between two looks at how long the server has been silent


class Rows:
    """The rows that a statement returned, decoded on iteration."""

    def __init__(self, result: PGresult) -> None:
        self._result = result

    def __len__(self) -> int:
        return self._result.ntuples

    def __iter__(self) -> Iterator[tuple[str | None, ...]]:
        columns = range(self._result.nfields)
        for row in range(self._result.ntuples):
            yield tuple(_text(self._result.get_value(row, column)) for column in columns)


class PostgresLink:
    """Executes statements, one at a time.

    Args:
        connection: open, in autocommit mode, of encoding UTF-8; closed with the link.
        silence: is told when the server hangs.
    """

    def __init__(self, connection: psycopg.AsyncConnection[Any], silence: Silence) -> None:
        self.connection = connection
        self._silence = silence
        self._watchdog: asyncio.TimerHandle | None = None
        self._watch_at = 0.0
        self._silent_since = 0.0
        self._libpq = connection.pgconn
        # libpq closes the socket when the connection is lost, and no longer tells its number then.
        self._socket = self._libpq.socket
        self._loop = asyncio.get_running_loop()
        self._names: dict[str, bytes] = {}
        self._reply: asyncio.Future[PGresult] | None = None
        self._result: PGresult | None = None
        self._lost: Exception | None = None
        self._is_full = False
        self._loop.add_reader(self._socket, self._read)

    async def execute(self, statement: str, *parameters: bytes | None) -> Rows:
        """Execute a statement; the rows that it returns, as text.

        Args:
            statement: `$1` is its first parameter; it is prepared when it is first executed.
            parameters: as text in UTF-8; None is null.

        Raises:
            psycopg.Error: the server's own, or the connection is lost.
        """
        name = self._names.get(statement)
        if name is None:
            name = b"autoflow_%d" % len(self._names)
            await self._ask(self._libpq.send_prepare, name, statement.encode())
            self._names[statement] = name
        return Rows(await self._ask(self._libpq.send_query_prepared, name, parameters))

    def _ask(self, send: Callable[..., None], *args: Any) -> asyncio.Future[PGresult]:
        if self._lost is not None:
            raise psycopg.OperationalError("the connection is lost") from self._lost
        assert self._reply is None, "one statement at a time"
        send(*args)
        self._reply = self._loop.create_future()
        self._silent_since = self._loop.time()
        if self._watchdog is None:
            self._watch_soon()
        self._flush()
        return self._reply

    def _flush(self) -> None:
        """Send what libpq has buffered; wait for the socket if it is full."""
        try:
            is_full = self._libpq.flush() != 0
        except Exception as error:
            self._lose(error)
            return
        if is_full and not self._is_full:
            self._loop.add_writer(self._socket, self._flush)
        elif self._is_full and not is_full:
            self._loop.remove_writer(self._socket)
        self._is_full = is_full

    def _watch_soon(self) -> None:
        self._watch_at = self._loop.time() + WATCH_INTERVAL
        self._watchdog = self._loop.call_at(self._watch_at, self._watch)

    def _watch(self) -> None:
        self._watchdog = None
        if self._reply is None or self._lost is not None:
            return
        now = self._loop.time()
        # While the event loop was blocked a reply may have arrived, so that time does not count.
        self._silent_since += max(0.0, now - self._watch_at)
        if now - self._silent_since >= SILENT_AFTER:
            self._silence.begin(self, self._silent_since)
        self._watch_soon()

    def _read(self) -> None:
        """Read from the socket: a reply, a part of one, or the connection's end."""
        self._silent_since = self._loop.time()
        self._silence.end(self)
        try:
            self._libpq.consume_input()
            if not self._is_complete():
                # uvloop reports a connection that was reset only once, so look for its end as well.
                self._libpq.consume_input()
                if not self._is_complete():
                    return
        except Exception as error:
            self._lose(error)
            return
        reply, self._reply = self._reply, None
        result, self._result = self._result, None
        if reply is None or reply.done() or result is None:
            return
        if result.status in (ExecStatus.TUPLES_OK, ExecStatus.COMMAND_OK):
            reply.set_result(result)
        else:
            reply.set_exception(error_from_result(result))

    def _is_complete(self) -> bool:
        """Take the results that have arrived, and return whether the reply is complete."""
        while not self._libpq.is_busy():
            result = self._libpq.get_result()
            if result is None:
                return True
            self._result = result
        return False

    def _lose(self, error: Exception) -> None:
        """Fail the statement: the connection is lost, or this code is wrong."""
        self._ignore_socket()
        self._lost = error
        reply, self._reply = self._reply, None
        if reply is None or reply.done():
            return
        if self._result is not None and self._result.status == ExecStatus.FATAL_ERROR:
            error = error_from_result(self._result)  # the server's own last words
        reply.set_exception(error)

    def _ignore_socket(self) -> None:
        if self._lost is None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            if self._watchdog is not None:
                self._watchdog.cancel()
            self._silence.forget(self)

    async def close(self) -> None:
        """Close the connection. May be called twice."""
        self._ignore_socket()
        self._lost = psycopg.OperationalError("the connection is closed")
        await self.connection.close()


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode()
