"""One connection to Redis that is shared by pipelining, and never lost for good.

redis-py spends 150 to 200 microseconds on each command and lets one command at a time onto a
connection. Here, commands that are issued in the same turn of the event loop leave in few writes,
and hiredis matches the replies in order. Connecting (TLS, ACL users, unix sockets, database
numbers, client names) stays redis-py's own: a `Channel` takes the connected socket over from it.
"""

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable
from typing import Any, Final, cast

import hiredis
import structlog
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    InvalidResponse,
    NoPermissionError,
    NoScriptError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker.broker.denials import is_denial
from autoflow_worker.errors import RedisRefusedError, RedisUnavailableError
from autoflow_worker.outage import SILENT_AFTER, Reasons, Refusals, Silence

log = structlog.get_logger(__name__)

FULL_OUTBOX: Final = 8
"""Commands that leave at once, so that the server works on them while more are made."""

REPLY_PATIENCE: Final = 10.0
"""Seconds without a single reply after which a connection counts as half-open and is dropped."""

WATCH_INTERVAL: Final = 1.0
"""Seconds between two looks at how long the server has been silent."""

CONNECT_PATIENCE: Final = 5.0
"""Seconds that a new command waits for a connection before it fails."""

RETRY_PAUSE: Final = 0.05
"""Seconds before the second attempt to connect; doubled from there on."""

RETRY_PAUSE_MAX: Final = 1.0
"""Seconds between two attempts to connect, at most."""

# Redis 6 wraps what a script ran into; later servers answer with the code alone.
_ERROR_CODE: Final = re.compile(r"(?:ERR Error running script .*?: -?)?([A-Z]+) ", re.DOTALL)
# UNBLOCKED is what a blocked connection gets when its server becomes a replica.
_WRONG_SERVER: Final = frozenset({"READONLY", "LOADING", "MASTERDOWN", "NOAUTH", "UNBLOCKED"})
_UNABLE_SERVER: Final = frozenset(
    {"MISCONF", "OOM", "BUSY", "NOREPLICAS", "CLUSTERDOWN", "TRYAGAIN", "UNKILLABLE"}
)
# What Redis, Lua, cjson and cmsgpack say of the data that a command or a script works on. Whatever
# else a server says is about the server.
_DATA_AT_FAULT: Final = re.compile(
    r"""
    WRONGTYPE
    | not\ an\ integer | not\ a\ valid\ float | is\ not\ a\ float | not\ a\ valid\ number
    | would\ overflow | would\ produce\ NaN | out\ of\ range
    | attempt\ to\ (?: index | call | perform | compare | concatenate | get\ length )
    | bad\ argument\ \# | must\ be\ strings\ or\ integers
    | stack\ overflow | too\ many\ results\ to\ unpack
    | Expected\ .*\ but\ found | nested\ data\ structures | Excessive\ nesting | Cannot\ serialise
    | Missing\ bytes\ in\ input | Bad\ data\ format\ in\ input
    | BUSYGROUP | The\ ID\ specified\ in\ XADD | Invalid\ stream\ ID
    """,
    re.VERBOSE,
)
_REFUSALS: Final = (AuthenticationError, AuthorizationError, NoPermissionError)
# What SELECT is answered where there is no such database.
_NO_DATABASE: Final = re.compile(r"command .SELECT|SELECT is not|DB index")
_INCOMPLETE: Final = object()


class ServerNotReadyError(RedisConnectionError):
    """The server answered that it can't serve commands now; nothing was executed."""


class CommandRefusedError(RedisConnectionError):
    """The server refused a command for reasons of its own, and perhaps a script half-way.

    A right that the user lacks, a quota, a proxy's error: no job is to blame for it. It is an
    outage of what was asked for, so whoever rides out a lost connection rides out this as well.
    """


class WrongServerError(ServerNotReadyError):
    """The server is a replica, or is loading: a new connection may reach one that serves."""


class Channel:
    """One connection on which commands are pipelined, and which reconnects for ever.

    A caller that is cancelled leaves its place in the row of replies, so its neighbours' replies
    are never shifted. What was in flight when the connection broke fails with redis-py's
    `ConnectionError`: nobody can know whether it was executed, so the caller has to ask.

    Attributes:
        link: the connected socket; None while there is none.
        client_id: the server's id of this connection, for CLIENT UNBLOCK.
        restored_at: event loop time of the end of the last outage; -inf if there was none.
        died: done, with an exception, if reconnecting itself broke (a bug, not an outage).
    """

    def __init__(
        self,
        pool: ConnectionPool,
        client_name: str | None,
        refusals: Refusals,
        silence: Silence,
        *,
        quiet: bool,
    ) -> None:
        self._pool = pool
        self._client_name = client_name
        self._refusals = refusals
        self._silence = silence
        self._reasons = Reasons()
        self._troubled = False
        self._replies = (self, "replies")
        self._log = log.debug if quiet else log.warning
        self._loop = asyncio.get_running_loop()
        self.link: _Link | None = None
        self._outbox: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self._connected = asyncio.Event()
        self._connector: asyncio.Task[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._watch_at = 0.0
        self._silent_since = 0.0
        self._patience = REPLY_PATIENCE
        self._closing = False
        self._misled = False
        self.client_id = 0
        self.restored_at = -math.inf
        self.died: asyncio.Future[None] = self._loop.create_future()

    async def open(self, timeout: float) -> None:
        """Connect for the first time.

        Args:
            timeout: seconds to keep trying.

        Raises:
            RedisUnavailableError: the server was not reached in time.
            RedisRefusedError: it refuses the credentials, or the number of the database.
        """
        deadline = self._loop.time() + timeout
        pause = RETRY_PAUSE
        while True:
            try:
                await self._connect()
            except (RedisError, OSError) as error:
                if _NO_DATABASE.search(str(error)):
                    raise RedisRefusedError(
                        f"Redis refuses the database number of REDIS_URL: {error} "
                        "(a Sentinel, or a node of a cluster, has no numbers)"
                    ) from error
                if _is_refusal(error):
                    raise RedisRefusedError(f"Redis refuses the connection: {error}") from error
                if self._loop.time() + pause > deadline:
                    raise RedisUnavailableError(
                        f"Redis can't be reached within {timeout:g} s: {error}"
                    ) from error
                await asyncio.sleep(pause)
                pause = min(pause * 2, RETRY_PAUSE_MAX)
            else:
                return

    async def close(self) -> None:
        """Close the connection; what is in flight fails. May be called twice."""
        self._closing = True
        if self._connector is not None:
            self._connector.cancel()
            await asyncio.wait({self._connector})
        self._drop(RedisConnectionError("the Redis client is closed"))
        self.died.cancel()

    @property
    def is_connected(self) -> bool:
        return self.link is not None

    async def connected(self) -> None:
        """Wait until there is a connection, however long it takes."""
        await self._connected.wait()

    def execute(self, args: tuple[Any, ...], *, patience: float = REPLY_PATIENCE) -> Awaitable[Any]:
        """Send one command; what is returned waits for its reply.

        No coroutine, as it is on every job's way: one that is connected has nothing to wait for.

        Args:
            patience: seconds of silence after which the connection counts as half-open; the
                command's own blocking time comes on top of `REPLY_PATIENCE`.

        Raises:
            redis.exceptions.ConnectionError: there is no connection, or it broke before the reply.
            redis.exceptions.ResponseError: the server's own error.
        """
        if self.link is None:
            return self._execute_once_connected(args, patience)
        return self._send(args, patience)

    async def _execute_once_connected(self, args: tuple[Any, ...], patience: float) -> Any:
        while self.link is None:
            await self._await_connection()
        return await self._send(args, patience)

    def _send(self, args: tuple[Any, ...], patience: float) -> asyncio.Future[Any]:
        packed = _pack(args)
        idle = not self._waiting
        if idle:
            self._silent_since = self._loop.time()
            self._patience = patience
        elif not self._outbox:
            self._loop.call_soon(self._flush)
        self._outbox.append(packed)
        reply: asyncio.Future[Any] = self._loop.create_future()
        self._waiting.append(reply)
        if idle or len(self._outbox) >= FULL_OUTBOX:
            # Whoever is alone has nobody to wait for.
            self._flush()
        return reply

    async def _await_connection(self) -> None:
        if self._closing:
            raise RedisConnectionError("the Redis client is closed")
        try:
            async with asyncio.timeout(CONNECT_PATIENCE):
                await self._connected.wait()
        except TimeoutError:
            raise RedisConnectionError(f"no connection to Redis for {CONNECT_PATIENCE} s") from None

    def _flush(self) -> None:
        if self.link is None or not self._outbox:
            return
        if self.link.transport.is_closing():
            return  # `on_lost` is on its way, and uvloop raises at a write.
        self.link.transport.write(b"".join(self._outbox))
        self._outbox.clear()
        if self._watchdog is None:
            self._watch_soon()

    def _watch(self) -> None:
        self._watchdog = None
        if not self._waiting:
            return
        now = self._loop.time()
        # While something blocked the loop, replies may have come: that is not the server's silence.
        self._silent_since += max(0.0, now - self._watch_at)
        silent = now - self._silent_since
        if silent > self._patience:
            self._drop(RedisConnectionError(f"Redis gave no reply for {self._patience:g} s"))
            return
        blocking = max(0.0, self._patience - REPLY_PATIENCE)
        if silent - blocking >= SILENT_AFTER:
            self._troubled = True
            self._silence.begin(self, self._silent_since + blocking)
        self._watch_soon()

    def _watch_soon(self) -> None:
        self._watch_at = self._loop.time() + WATCH_INTERVAL
        self._watchdog = self._loop.call_at(self._watch_at, self._watch)

    def on_reply(self, reply: Any) -> None:
        """Give the next reply to the caller that has waited longest."""
        self._silent_since = self._loop.time()
        if self._troubled:
            self._note_reply(reply)
        if not self._waiting:
            self._drop(RedisConnectionError("Redis sent a reply that nobody asked for"))
            return
        future = self._waiting.popleft()
        if not isinstance(reply, Exception):
            if not future.done():
                future.set_result(reply)
            return
        if not future.done():
            future.set_exception(reply)
        if is_denial(reply):
            self._troubled = True
            self._refusals.note(self._replies)
        if isinstance(reply, WrongServerError):
            self._drop(reply)

    def _note_reply(self, reply: Any) -> None:
        """The server answers after a silence or a refusal."""
        self._silence.end(self)
        if not isinstance(reply, Exception):
            self._refusals.over(self._replies)
            self._troubled = False

    def on_lost(self, link: "_Link", reason: str) -> None:
        """The connection broke, or what came over it made no sense."""
        if link is self.link:
            self._drop(RedisConnectionError(f"the connection to Redis was lost: {reason}"))

    def _drop(self, reason: RedisConnectionError) -> None:
        """Forget the connection, fail what was in flight, and start to reconnect."""
        link, self.link = self.link, None
        if link is None:
            return
        self._connected.clear()
        link.abort()
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None
        self._outbox.clear()
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(RedisConnectionError(str(reason)))
        if not self._closing:
            self._reasons.is_new(str(reason))
            self._log("redis_connection_lost", reason=str(reason))
            # A server that answers at once, but wrongly, must not be asked in a tight loop.
            self._misled = isinstance(reason, WrongServerError)
            pause = RETRY_PAUSE_MAX / 2 if self._misled else 0.0
            self._connector = self._loop.create_task(self._reconnect(pause))
            self._connector.add_done_callback(self._note_end)

    async def _reconnect(self, pause: float) -> None:
        lost_at = self._loop.time()
        while True:
            await asyncio.sleep(pause)
            try:
                await self._connect()
            except (RedisError, OSError) as error:
                self._note_failure(error)
                pause = min(max(pause * 2, RETRY_PAUSE), RETRY_PAUSE_MAX)
            else:
                self._refusals.over(self)
                self._reasons.forget()
                self.restored_at = self._loop.time()
                away = round(self.restored_at - lost_at, 1)
                self._log("redis_connection_restored", after_s=away)
                self._silence.end(self)
                return

    def _note_failure(self, error: Exception) -> None:
        """Connecting has failed: each reason is told once."""
        if _is_refusal(error):
            event = "redis_connection_refused"
            self._refusals.note(self)
        else:
            event = "redis_connection_failed"
            self._refusals.forget()  # It is an outage, which is waited out.
        if self._reasons.is_new(reason := str(error)):
            self._log(event, reason=reason)

    def _note_end(self, connector: asyncio.Task[None]) -> None:
        if self._closing or self.died.done():
            return
        if connector.cancelled():
            self.died.cancel()
        elif error := connector.exception():
            self.died.set_exception(error)

    async def _connect(self) -> None:
        """Let redis-py connect and authenticate, then take the socket over from it."""
        connection: AbstractConnection = self._pool.make_connection()  # type: ignore[no-untyped-call]
        connection.client_name = self._client_name
        try:
            await connection.connect()  # type: ignore[no-untyped-call]
            # A server that is loading accepts connections and refuses everything else.
            await connection.send_command("PING")
            await connection.read_response()
            if self._misled:
                await _refuse_replica(connection)
            self.client_id = await _id_of(connection)
            self.link = _Link(connection, self)
        except BaseException as error:
            connection._close()  # type: ignore[no-untyped-call]
            if isinstance(error, RuntimeError) and "the handler is closed" in str(error):
                # uvloop's word for a socket that the server has closed before the next write.
                raise RedisConnectionError("the connection was lost while connecting") from error
            raise
        self._connected.set()


class _Link(asyncio.Protocol):
    """One connected socket of a `Channel`: bytes in, replies out."""

    def __init__(self, connection: AbstractConnection, channel: Channel) -> None:
        writer = connection._writer
        if writer is None or writer.transport.is_closing():
            raise RedisConnectionError("the connection to Redis was lost while connecting")
        self._connection = connection
        self._channel = channel
        self._parser = hiredis.Reader(
            protocolError=InvalidResponse,
            replyError=_reply_error,
            encoding="utf-8",
            errors="surrogateescape",
            notEnoughData=_INCOMPLETE,
        )
        self.transport = cast(asyncio.Transport, writer.transport)
        self.transport.set_protocol(self)
        # uvloop would hold each write back until the end of the loop's turn.
        self.transport.set_write_buffer_limits(high=1)

    def data_received(self, data: bytes) -> None:
        self._parser.feed(data)
        try:
            while (reply := self._parser.gets()) is not _INCOMPLETE:
                self._channel.on_reply(reply)
        except InvalidResponse as error:
            self._channel.on_lost(self, f"not the Redis protocol: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._channel.on_lost(self, str(exc or "closed by the server"))

    def abort(self) -> None:
        self.transport.abort()
        self._connection._writer = self._connection._reader = None


async def _id_of(connection: AbstractConnection) -> int:
    await connection.send_command("CLIENT", "ID")
    client_id = await connection.read_response()
    if not isinstance(client_id, int):
        raise InvalidResponse(f"this is no Redis server: its client's id is {client_id!r}")
    return client_id


async def _refuse_replica(connection: AbstractConnection) -> None:
    """Raise `WrongServerError` if this is a replica: a connection to it brings only errors.

    Asked only where a server has sent us away before: it takes a round trip.
    """
    await connection.send_command("INFO", "replication")
    try:
        role = str(await connection.read_response())
    except NoPermissionError:
        return
    if "role:slave" in role:
        raise WrongServerError("the server is a replica")


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, _REFUSALS) or is_denial(error)


def _reply_error(text: str) -> Exception:
    """The exception for an error reply.

    A `ResponseError` is about the data that the command worked on. What another server, another
    moment or an operator could mend is a `ConnectionError`.
    """
    match = _ERROR_CODE.match(text)
    code = match.group(1) if match else ""
    if code in _WRONG_SERVER:
        return WrongServerError(text)
    if code in _UNABLE_SERVER:
        return ServerNotReadyError(text)
    error = cast(Exception, BaseParser.parse_error(text))  # type: ignore[no-untyped-call]
    if isinstance(error, NoScriptError | RedisConnectionError) or _DATA_AT_FAULT.search(text):
        return error
    return CommandRefusedError(text)


def _pack(args: tuple[Any, ...]) -> bytes:
    """Encode one command; text that came in as bytes outside UTF-8 leaves as it came."""
    if " " in args[0]:  # "SCRIPT LOAD" and the like, as redis-py names them
        args = (*args[0].split(), *args[1:])
    try:
        return bytes(hiredis.pack_command(args))
    except UnicodeEncodeError:
        encoded: list[Any] = [
            arg.encode(errors="surrogateescape") if isinstance(arg, str) else arg for arg in args
        ]
        return bytes(hiredis.pack_command(tuple(encoded)))
