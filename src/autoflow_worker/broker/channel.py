"""One connection to Redis that is shared by pipelining, and reconnects for ever.

redis-py spends 150 to 200 microseconds on each command and lets one command at a time onto a
connection. Here, commands that are issued in the same turn of the event loop leave in few writes,
and hiredis matches the replies in order.
"""

import asyncio
import math
import re
from collections import deque
from collections.abc import Awaitable
from typing import Any, Final

import structlog
from redis.asyncio import ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from autoflow_worker.broker.link import Link, connect
from autoflow_worker.broker.replies import WrongServerError, is_denial, is_refusal, pack
from autoflow_worker.errors import RedisRefusedError, RedisUnavailableError
from autoflow_worker.outage import SILENT_AFTER, Reasons, Refusals, Silence
from autoflow_worker.pauses import Pauses

log = structlog.get_logger(__name__)

FULL_OUTBOX: Final = 8  # commands leave at once: the server works while more are made

REPLY_PATIENCE: Final = 10.0
"""Seconds without a single reply after which a connection counts as half-open and is dropped."""

WATCH_INTERVAL: Final = 1.0
"""Seconds between two checks of how long the server has been silent."""

CONNECT_PATIENCE: Final = 5.0
"""Seconds that a new command waits for a connection before it fails."""

RETRY_PAUSE: Final = 0.05
"""Seconds between the first two attempts to connect; doubled up to `RETRY_PAUSE_MAX`."""

RETRY_PAUSE_MAX: Final = 1.0

# The replies to SELECT of a database that does not exist.
_NO_DATABASE: Final = re.compile(r"command .SELECT|SELECT is not|DB index")


class Channel:
    """One connection on which commands are pipelined.

    A cancelled caller leaves its place in the queue of replies, so the other callers still get
    their own replies. Commands that were in flight when the connection broke fail with redis-py's
    `ConnectionError`. Nobody knows whether the server ran them, so the callers have to ask.

    Args:
        client_name: the connection's name for CLIENT LIST. None is for the shared connection, whose
            losses are logged as warnings; the others' are logged at level debug.
        refusals: told when the server refuses this connection or a command.
        silence: told when the server owes a reply for too long.

    Attributes:
        link: the connected socket; None while there is none.
        connected: set while there is a connection.
        restored_at: event loop time of the end of the last outage; -inf if there was none.
        died: done, with an exception, if reconnecting itself broke (a bug, not an outage).
    """

    def __init__(
        self,
        pool: ConnectionPool,
        client_name: str | None,
        refusals: Refusals,
        silence: Silence,
    ) -> None:
        self._pool = pool
        self._client_name = client_name
        self._refusals = refusals
        self._silence = silence
        self._reasons = Reasons()
        self._troubled = False
        self._replies = (self, "replies")
        self._log = log.warning if client_name is None else log.debug
        self._loop = asyncio.get_running_loop()
        self.link: Link | None = None
        self._outbox: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any]] = deque()
        self.connected = asyncio.Event()
        self._connector: asyncio.Task[None] | None = None
        self._watchdog: asyncio.TimerHandle | None = None
        self._watch_at = 0.0
        self._silent_since = 0.0
        self._patience = REPLY_PATIENCE
        self._closing = False
        self._misled = False
        self.restored_at = -math.inf
        self.died: asyncio.Future[None] = self._loop.create_future()

    async def open(self, timeout: float) -> None:
        """Connect for the first time, and keep trying for `timeout` seconds.

        Raises:
            RedisUnavailableError: the server was not reached in time.
            RedisRefusedError: the server refuses the credentials or the database number.
        """
        deadline = self._loop.time() + timeout
        pauses = Pauses(RETRY_PAUSE, RETRY_PAUSE_MAX)
        while True:
            try:
                return await self._connect()
            except (RedisError, OSError) as error:
                if _NO_DATABASE.search(str(error)):
                    raise RedisRefusedError(
                        f"Redis refuses the database number of REDIS_URL: {error} "
                        "(a Sentinel, or a node of a cluster, has no numbers)"
                    ) from error
                if is_refusal(error):
                    raise RedisRefusedError(f"Redis refuses the connection: {error}") from error
                pause = pauses.take()
                if self._loop.time() + pause > deadline:
                    raise RedisUnavailableError(
                        f"Redis can't be reached within {timeout:g} s: {error}"
                    ) from error
                await asyncio.sleep(pause)

    async def close(self) -> None:
        """Close the connection; commands in flight fail. May be called twice."""
        self._closing = True
        if self._connector is not None:
            self._connector.cancel()
            await asyncio.wait({self._connector})
        self._drop(RedisConnectionError("the Redis client is closed"))
        self.died.cancel()

    @property
    def silent_for(self) -> float:
        """Seconds for which the server has owed a reply; 0 or less if it owes none."""
        if not self._waiting:
            return 0.0
        blocking = max(0.0, self._patience - REPLY_PATIENCE)
        return self._loop.time() - self._silent_since - blocking

    def execute(self, args: tuple[Any, ...], *, patience: float = REPLY_PATIENCE) -> Awaitable[Any]:
        """Send one command, and return an awaitable of its reply.

        While there is a connection, this is a plain future: each job needs it twice.

        Args:
            patience: seconds of silence after which the connection counts as half-open. A blocking
                command adds its own blocking time to `REPLY_PATIENCE`.

        Raises:
            redis.exceptions.ConnectionError: there is no connection, it broke before the reply, or
                the server can't or won't run the command.
            redis.exceptions.ResponseError: the data is at fault.
        """
        if self.link is None:
            return self._execute_once_connected(args, patience)
        return self._send(args, patience)

    async def _execute_once_connected(self, args: tuple[Any, ...], patience: float) -> Any:
        while self.link is None:
            if self._closing:
                raise RedisConnectionError("the Redis client is closed")
            try:
                async with asyncio.timeout(CONNECT_PATIENCE):
                    await self.connected.wait()
            except TimeoutError:
                raise RedisConnectionError(
                    f"no connection to Redis for {CONNECT_PATIENCE} s"
                ) from None
        return await self._send(args, patience)

    def _send(self, args: tuple[Any, ...], patience: float) -> asyncio.Future[Any]:
        packed = pack(args)
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
            # An idle server starts at once; a busy one takes what the rest of this turn adds.
            self._flush()
        return reply

    def _flush(self) -> None:
        if self.link is None or not self._outbox:
            return
        if self.link.transport.is_closing():
            return  # The loop calls `on_lost` next. uvloop would raise at a write.
        self.link.transport.write(b"".join(self._outbox))
        self._outbox.clear()
        if self._watchdog is None:
            self._watch_soon()

    def _watch(self) -> None:
        self._watchdog = None
        if not self._waiting:
            return
        # If this timer is late, the loop was blocked. Replies may have come in that time, so it
        # does not count as the server's silence.
        now = self._loop.time()
        self._silent_since += max(0.0, now - self._watch_at)
        if now - self._silent_since > self._patience:
            self._drop(RedisConnectionError(f"Redis gave no reply for {self._patience:g} s"))
            return
        silent_for = self.silent_for
        if silent_for >= SILENT_AFTER:
            self._troubled = True
            self._silence.begin(self, now - silent_for)
        self._watch_soon()

    def _watch_soon(self) -> None:
        self._watch_at = self._loop.time() + WATCH_INTERVAL
        self._watchdog = self._loop.call_at(self._watch_at, self._watch)

    def on_reply(self, reply: Any) -> None:
        """Give the next reply to the caller that has waited longest."""
        self._silent_since = self._loop.time()
        if self._troubled:  # by a silence or a refusal
            self._silence.end(self)
            if not isinstance(reply, Exception):
                self._refusals.over(self._replies)
                self._troubled = False
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

    def on_lost(self, link: Link, reason: str) -> None:
        """Drop the connection: it broke, or its bytes are not Redis' protocol."""
        if link is self.link:
            self._drop(RedisConnectionError(f"the connection to Redis was lost: {reason}"))

    def _drop(self, reason: RedisConnectionError) -> None:
        """Close the connection, fail the commands in flight, and start to reconnect."""
        link, self.link = self.link, None
        if link is None:
            return
        self.connected.clear()
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
            self._misled = isinstance(reason, WrongServerError)
            self._connector = self._loop.create_task(self._reconnect())
            self._connector.add_done_callback(self._note_end)

    async def _reconnect(self) -> None:
        lost_at = self._loop.time()
        pauses = Pauses(RETRY_PAUSE, RETRY_PAUSE_MAX)
        if self._misled:
            # A replica accepts connections at once. Without a pause this would be a tight loop.
            pauses = Pauses(RETRY_PAUSE_MAX / 2, RETRY_PAUSE_MAX)
            await pauses.sleep()
        while True:
            try:
                await self._connect()
            except (RedisError, OSError) as error:
                self._note_failure(error)
                await pauses.sleep()
            else:
                self._refusals.over(self)
                self._reasons.forget()
                self.restored_at = self._loop.time()
                away = round(self.restored_at - lost_at, 1)
                self._log("redis_connection_restored", after_s=away)
                self._silence.end(self)
                return

    def _note_failure(self, error: Exception) -> None:
        """Log why connecting failed, each reason once."""
        if is_refusal(error):
            event = "redis_connection_refused"
            self._refusals.note(self)
        else:
            event = "redis_connection_failed"
            self._refusals.forget()  # This is an outage, and any outage is waited out.
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
        # The role is only asked for after a server that was a replica.
        self.link = await connect(self._pool, self._client_name, self, refuse_replica=self._misled)
        self.connected.set()
