"""A proxy between a client and Redis that can lose, delay and cut."""

import asyncio
import ssl
from collections.abc import Iterator
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import hiredis

CHUNK = 1024 * 1024
_INCOMPLETE = object()


class Ambush:
    """Loses or delays the reply to the first command with `needle` in one of its arguments.

    Attributes:
        sprung: set when the server has replied, and so has run the command.
        count: the number of such commands, with the first one.
    """

    def __init__(self, needle: bytes, *, cut: bool) -> None:
        self.needle = needle
        self.cut = cut
        self.count = 0
        self.sprung = asyncio.Event()
        self._released = asyncio.Event()

    def release(self) -> None:
        """Forward the reply that is held."""
        self._released.set()

    async def spring(self) -> None:
        self.sprung.set()
        if not self.cut:
            await self._released.wait()


class Proxy:
    """Forwards to one server; an async context manager.

    Args:
        url: of the server.
        tls: the proxy's own TLS context; None for plain TCP.

    Attributes:
        url: of the proxy, with the server's scheme.
        commands: the commands of all clients.
        chunks: the number of commands that each received piece completed.
        accepted: connections so far.
    """

    def __init__(self, url: str, tls: ssl.SSLContext | None = None) -> None:
        self._parts = urlsplit(url)
        self._tls = tls
        self._server_port = self._parts.port
        self._links: set[_Link] = set()
        self._server: asyncio.Server | None = None
        self._ambushes: list[Ambush] = []
        self._port = 0
        self.commands: list[list[bytes]] = []
        self.chunks: list[int] = []
        self.accepted = 0

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        links = set(self._links)
        self.cut()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)

    @property
    def url(self) -> str:
        auth, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{auth}{at}127.0.0.1:{self._port}"))

    async def listen(self) -> None:
        """Accept connections, always on the same port."""
        self._server = await asyncio.start_server(
            self._accept, "127.0.0.1", self._port, ssl=self._tls
        )
        self._port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Accept no more connections, and keep the existing ones."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def redirect(self, port: int) -> None:
        """Send new connections to another server."""
        self._server_port = port

    def cut(self) -> None:
        """Break every connection."""
        for link in self._links:
            link.task.cancel()

    def freeze(self) -> None:
        """Stop forwarding on all existing connections, and keep them open."""
        for link in self._links:
            link.flowing.clear()

    def lose_reply_to(self, needle: bytes) -> Ambush:
        """Cut the connection that next sends `needle`, once the server has replied."""
        return self._lay(Ambush(needle, cut=True))

    def hold_reply_to(self, needle: bytes) -> Ambush:
        """Hold the reply to the next command with `needle`, and every later reply."""
        return self._lay(Ambush(needle, cut=False))

    def _lay(self, ambush: Ambush) -> Ambush:
        self._ambushes.append(ambush)
        return ambush

    def walk(self, command: list[bytes]) -> Ambush | None:
        """Note a command, and return the ambush that it triggers."""
        self.commands.append(command)
        met = [a for a in self._ambushes if any(a.needle in argument for argument in command)]
        for ambush in met:
            ambush.count += 1
        return next((ambush for ambush in met if ambush.count == 1), None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(self)
        self._links.add(link)
        try:
            await link.run(reader, writer, self._parts.hostname, self._server_port)
        except (OSError, asyncio.CancelledError):
            pass  # A side closed its connection, or `cut()` was called.
        finally:
            self._links.discard(link)


class _Link:
    """One client's connection, and its counterpart to the server."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._asked = 0
        self._answered = 0
        self._ambushes: dict[int, Ambush] = {}
        task = asyncio.current_task()
        assert task is not None
        self.task: asyncio.Task[None] = task
        self.flowing = asyncio.Event()
        self.flowing.set()

    async def run(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        host: str | None,
        port: int | None,
    ) -> None:
        to_server: asyncio.StreamWriter | None = None
        try:
            from_server, to_server = await asyncio.open_connection(host, port)
            pumps = [
                asyncio.create_task(self._requests(reader, to_server)),
                asyncio.create_task(self._replies(from_server, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            for side in (writer, to_server):
                if side is not None:
                    side.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        parser = _parser()
        while data := await reader.read(CHUNK):
            before = self._asked
            for command in _messages(parser, data):
                if ambush := self._proxy.walk(command):
                    self._ambushes[self._asked] = ambush
                self._asked += 1
            self._proxy.chunks.append(self._asked - before)
            await self.flowing.wait()
            server.write(data)
            await server.drain()

    async def _replies(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        parser = _parser()
        while data := await reader.read(CHUNK):
            await self.flowing.wait()
            for _ in _messages(parser, data):
                ambush = self._ambushes.get(self._answered)
                self._answered += 1
                if ambush is not None:
                    await ambush.spring()
                    if ambush.cut:
                        return
            client.write(data)
            await client.drain()


def _parser() -> hiredis.Reader:
    return hiredis.Reader(notEnoughData=_INCOMPLETE)


def _messages(parser: hiredis.Reader, data: bytes) -> Iterator[Any]:
    parser.feed(data)
    while (message := parser.gets()) is not _INCOMPLETE:
        yield message
