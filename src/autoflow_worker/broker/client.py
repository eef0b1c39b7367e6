"""The Redis client that everything in one process shares; `channel` makes it fast."""

import asyncio
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from operator import attrgetter
from typing import Any, Final, cast

import structlog
from redis._parsers.base import BaseParser
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.connection import Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError, RedisError

from autoflow_worker.broker.channel import Channel
from autoflow_worker.broker.libraries import mismatch
from autoflow_worker.broker.redis_urls import redis_url
from autoflow_worker.broker.replies import (
    CommandRefusedError,
    ServerNotReadyError,
    WrongServerError,
    is_denial,
)
from autoflow_worker.outage import Reasons, Refusals, Silence

log = structlog.get_logger(__name__)

HANDSHAKE_TIMEOUT: Final = 5.0
"""Seconds that connecting, and each reply while connecting, may take."""

# Seconds, seconds and a count: the kernel probes an idle connection, and closes it if the peer is
# dead or its address has another server.
_KEEPALIVE: Final = {"TCP_KEEPIDLE": 3, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 4}

_BLOCKING_COMMANDS: Final = frozenset(
    {"BLMOVE", "BLPOP", "BRPOP", "BRPOPLPUSH", "BZPOPMAX", "BZPOPMIN", "XREAD", "XREADGROUP"}
)


class PipelinedRedis(Redis):
    """A `redis.asyncio.Redis` whose commands all share one pipelined `Channel`.

    bullmq takes any `redis.asyncio.Redis`, so it takes this one. Blocking commands, pipelines and
    transactions take connections of redis-py's pool, as always.

    Raises:
        ValueError: `redis_urls.redis_url` does not take the URL.
        LibraryMismatchError: the installed redis-py differs from the one that this package knows.

    Attributes:
        refusals: since when the server refuses connections, commands and scripts.
        shared: the connection of all commands that do not block.
    """

    def __init__(self, url: str) -> None:
        _require_known_redis()
        url = redis_url(url)
        pool = ConnectionPool.from_url(
            url,
            protocol=2,
            decode_responses=True,
            socket_timeout=HANDSHAKE_TIMEOUT,
            socket_connect_timeout=HANDSHAKE_TIMEOUT,
            retry=Retry(NoBackoff(), 0),
            **_keepalive_of(url),
        )
        _take_family(pool)
        super().__init__(connection_pool=pool)
        self.auto_close_connection_pool = True
        self._scripts: dict[str, AsyncScript] = {}
        self._refused: set[str] = set()
        self._reasons = Reasons()
        self.refusals = Refusals()
        self._silence = Silence("redis_silent", "redis_answers_again")
        self._channels: list[Channel] = []
        self.shared = self._add_channel(None)

    def _add_channel(self, client_name: str | None) -> Channel:
        channel = Channel(self.connection_pool, client_name, self.refusals, self._silence)
        self._channels.append(channel)
        return channel

    async def open(self, timeout: float) -> None:
        """Connect for the first time; see `Channel.open`."""
        await self.shared.open(timeout)

    async def open_blocking_channel(self, client_name: str, timeout: float) -> Channel:
        """Open a connection for one caller's blocking commands; `aclose` closes it too."""
        channel = self._add_channel(client_name)
        await channel.open(timeout)
        return channel

    async def connected(self) -> None:
        """Wait until there is a connection, however long it takes."""
        await self.shared.connected.wait()

    @property
    def is_connected(self) -> bool:
        return self.shared.link is not None

    def deaths(self) -> list[asyncio.Future[None]]:
        """Return a future for each connection; it gets an exception if reconnecting breaks."""
        return [channel.died for channel in self._channels]

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        """Close every connection. May be called twice."""
        await asyncio.gather(*(channel.close() for channel in self._channels))
        await super().aclose(close_connection_pool)

    def register_script(self, script: Any) -> AsyncScript:  # type: ignore[override]  # as Redis
        """Register a script as redis-py does, but once for all queues that register it."""
        registered = self._scripts.get(script)
        if registered is None:
            registered = self._scripts[script] = _Script(self, script)
        return registered

    async def run_script(self, script: "_Script", keys: Sequence[Any], args: Sequence[Any]) -> Any:
        """Run a script by its digest; load it first if the server does not know it."""
        command = ("EVALSHA", script.sha, len(keys), *keys, *args)
        try:
            try:
                reply = await self.shared.execute(command)
            except NoScriptError:
                await self.script_load(script.script)
                reply = await self.shared.execute(command)
        except WrongServerError:
            raise
        except RedisError as error:
            denied = is_denial(error)
            if denied:
                self.refusals.note(script.sha)
            if denied or isinstance(error, ServerNotReadyError | CommandRefusedError):
                if self._reasons.is_new(str(error)):
                    log.warning("redis_refuses_scripts", reason=str(error))
                self._refused.add(script.sha)
            raise
        if self._refused and script.sha in self._refused:
            self.refusals.over(script.sha)
            self._refused.clear()
            self._reasons.forget()
            log.warning("redis_takes_scripts_again")
        return reply

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        if args[0] in _BLOCKING_COMMANDS:
            return await super().execute_command(*args, **options)  # type: ignore[no-untyped-call]
        reply = await self.shared.execute(args)
        options.pop("keys", None)
        callback: Callable[..., Any] | None = self.response_callbacks.get(args[0])
        return reply if callback is None else callback(reply, **options)


@cache
def _require_known_redis() -> None:
    """Check that redis-py has the private parts that `link`, `replies` and this module use."""
    try:
        pool: Any = ConnectionPool()
        parser: Any = BaseParser
        connection = ("_writer", "_reader", "_close", "client_name", "connect", "send_command")
        attrgetter(*connection)(pool.make_connection())
        script = AsyncScript(Redis(connection_pool=pool), "return 1")
        attrgetter("registered_client", "script", "sha")(script)
        if not isinstance(parser.parse_error("NOSCRIPT No matching script"), NoScriptError):
            raise TypeError("the reply NOSCRIPT is another error")  # noqa: TRY301 - as any error
    except Exception as error:
        # Another version may raise anything.
        raise mismatch("redis", f"{type(error).__name__}: {error}") from error


def _keepalive_of(url: str) -> dict[str, Any]:
    if url.startswith("unix:"):
        return {}
    known = {name: value for name, value in _KEEPALIVE.items() if hasattr(socket, name)}
    return {"socket_keepalive_options": {getattr(socket, n): v for n, v in known.items()}}


class _OfFamily(Connection):
    """A connection over IPv4 alone, or over IPv6 alone."""

    def __init__(self, *, family: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._family = family

    def _connection_arguments(self) -> Mapping[str, Any]:
        return {**super()._connection_arguments(), "family": self._family}


class _SSLOfFamily(_OfFamily, SSLConnection):
    pass


def _take_family(pool: ConnectionPool) -> None:
    """Follow `family=4` or `family=6` of the URL, which redis-py does not know."""
    family = pool.connection_kwargs.pop("family", None)
    if family is not None:
        pool.connection_kwargs["family"] = socket.AF_INET if family == "4" else socket.AF_INET6
        with_tls = issubclass(pool.connection_class, SSLConnection)
        pool.connection_class = _SSLOfFamily if with_tls else _OfFamily


class _Script(AsyncScript):
    """redis-py's script, without its check for a pipeline at each call."""

    def __call__(self, keys: Any = None, args: Any = None, client: Any = None) -> Any:
        if client is not None:
            return super().__call__(keys, args, client)
        redis = cast(PipelinedRedis, self.registered_client)
        return redis.run_script(self, keys or (), args or ())
