"""Redis servers with a test's own options, such as a Unix socket or slow loading."""

import socket
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import cast

from redis.asyncio import Redis

from autoflow_worker.local.embedded import EmbeddedRedis


class ConfiguredRedis(EmbeddedRedis):
    """A server whose options may be changed before each start.

    Attributes:
        options: command-line options, without dashes.
        until_loaded: whether `start()` waits until the data is loaded; else for any reply.
    """

    def __init__(self, *, executable: Path | None = None, **options: str) -> None:
        super().__init__(appendonly=True, executable=executable)
        self.options = options
        self.until_loaded = True

    @property
    def unix_socket(self) -> Path:
        return self.directory / "redis.sock"

    async def load_slowly(self) -> None:
        """Make each later start load the data for some seconds, with LOADING as its reply."""
        self.until_loaded = False
        self.options["key-load-delay"] = "200"  # microseconds for each command in the log
        async with Redis.from_url(self.url) as client:
            fill = "for _ = 1, 10000 do redis.call('INCR', KEYS[1]) end"
            await cast(Awaitable[None], client.eval(fill, 1, "something-to-load"))

    def _command(self) -> Sequence[str | Path]:
        options = (part for name, value in self.options.items() for part in (f"--{name}", value))
        return [*super()._command(), "--unixsocket", self.unix_socket, *options]

    def _answers(self) -> bool:
        if self.until_loaded:
            return super()._answers()
        address = ("127.0.0.1", self.port)
        with suppress(OSError), socket.create_connection(address, timeout=5) as connection:
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(100))
        return False


class SentinelRedis(EmbeddedRedis):
    """A Sentinel without a server to watch."""

    def _command(self) -> Sequence[str | Path]:
        settings = self.directory / "sentinel.conf"
        settings.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.directory}\n")
        return [self._executable, settings, "--sentinel"]
