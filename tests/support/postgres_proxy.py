"""A proxy between a client and PostgreSQL that loses a request, or ends after a reply."""

import asyncio
from typing import Self
from urllib.parse import urlsplit, urlunsplit

CHUNK = 65_536
READY = b"Z\x00\x00\x00\x05I"  # the message that ends a reply


class PostgresProxy:
    """Forwards to one server; an async context manager.

    Args:
        url: of the server.
        lose: requests with these bytes do not reach the server.
        end_after: a reply with these bytes is the connection's last, and lacks its end.

    Attributes:
        url: of the proxy.
        accepted: connections so far.
        lost: set when a request was lost.
    """

    def __init__(self, url: str, *, lose: bytes = b"", end_after: bytes = b"") -> None:
        self._parts = urlsplit(url)
        self._lose = lose
        self._end_after = end_after
        self.accepted = 0
        self.lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        netloc = self._parts.netloc.replace(f":{self._parts.port}", f":{port}")
        self.url = urlunsplit(self._parts._replace(netloc=netloc))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()

    async def _serve(self, client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        self.accepted += 1
        server, to_server = await asyncio.open_connection(self._parts.hostname, self._parts.port)
        pumps = [
            asyncio.create_task(self._requests(client, to_server)),
            asyncio.create_task(self._replies(server, to_client)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for writer in (to_client, to_server):
            writer.close()
        for pump in pumps:
            pump.cancel()
        await asyncio.wait(pumps)

    async def _requests(self, client: asyncio.StreamReader, server: asyncio.StreamWriter) -> None:
        while data := await client.read(CHUNK):
            if self._lose and self._lose in data:
                self.lost.set()
            else:
                server.write(data)

    async def _replies(self, server: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        while data := await server.read(CHUNK):
            if self._end_after and self._end_after in data:
                client.write(data.removesuffix(READY))
                return
            client.write(data)
