"""One connected socket: redis-py connects it, and hiredis reads it.

Connecting (TLS, ACL users, unix sockets, database numbers, client names) stays redis-py's own. A
`Link` takes the socket over afterwards, as redis-py lets only one command at a time onto a
connection.
"""

import asyncio
from typing import Any, Protocol, cast

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import InvalidResponse, NoPermissionError

from autoflow_worker.broker.replies import INCOMPLETE, WrongServerError, new_reader


class Listener(Protocol):
    """Hears what comes over a link: a `Channel`."""

    def on_reply(self, reply: Any) -> None: ...
    def on_lost(self, link: "Link", reason: str) -> None: ...


class Link(asyncio.Protocol):
    """A socket whose replies go to a channel.

    Attributes:
        client_id: the server's id of this connection.
        transport: takes the bytes of commands.
    """

    def __init__(
        self, connection: AbstractConnection, client_id: object, channel: Listener
    ) -> None:
        if not isinstance(client_id, int):
            raise InvalidResponse(f"this is no Redis server: its client's id is {client_id!r}")
        writer = connection._writer
        if writer is None or writer.transport.is_closing():
            raise RedisConnectionError("the connection to Redis was lost while connecting")
        self._connection = connection
        self._channel = channel
        self._reader = new_reader()
        self.client_id = client_id
        self.transport = cast(asyncio.Transport, writer.transport)
        self.transport.set_protocol(self)
        # uvloop would hold each write back until the end of the loop's turn.
        self.transport.set_write_buffer_limits(high=1)

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        try:
            while (reply := self._reader.gets()) is not INCOMPLETE:
                self._channel.on_reply(reply)
        except InvalidResponse as error:
            self._channel.on_lost(self, f"not the Redis protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel.on_lost(self, str(exc or "closed by the server"))

    def abort(self) -> None:
        """Close the socket at once."""
        self.transport.abort()
        self._connection._writer = self._connection._reader = None


async def connect(
    pool: ConnectionPool, client_name: str | None, channel: Listener, *, refuse_replica: bool
) -> Link:
    """Let redis-py connect and authenticate, then take the socket over from it.

    Args:
        refuse_replica: whether to ask for the server's role, which takes a round trip.

    Raises:
        OSError: the server can't be reached.
        redis.exceptions.RedisError: as OSError, or the server refuses; `WrongServerError` if it is
            a replica.
    """
    connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]
    connection.client_name = client_name
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        # A server that is loading accepts connections and refuses everything else.
        await _ask(connection, "PING")
        if refuse_replica:
            await _refuse_replica(connection)
        return Link(connection, await _ask(connection, "CLIENT", "ID"), channel)
    except BaseException as error:
        connection._close()  # type: ignore[no-untyped-call]
        if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
            # uvloop raises this if the server closes the socket before the next write.
            raise RedisConnectionError("the connection was lost while connecting") from error
        raise


async def _refuse_replica(connection: AbstractConnection) -> None:
    """Raise `WrongServerError` if this is a replica, which refuses every write."""
    try:
        role = str(await _ask(connection, "INFO", "replication"))
    except NoPermissionError:
        return
    if "role:slave" in role:
        raise WrongServerError("the server is a replica")


async def _ask(connection: AbstractConnection, *command: str) -> object:
    await connection.send_command(*command)
    return await connection.read_response()
