"""A PostgreSQL pooler like PgBouncer in transaction mode, with one server session."""

import asyncio
import secrets
import struct
from typing import Self
from urllib.parse import urlsplit, urlunsplit

_ENCRYPTION_REQUESTS = {80877103, 80877104}
_PARAMETERS = {
    "server_version": "17.0",
    "server_encoding": "UTF8",
    "client_encoding": "UTF8",
    "standard_conforming_strings": "on",
    "integer_datetimes": "on",
}


def _message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!i", len(body) + 4) + body


async def _read(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    kind = await reader.readexactly(1)
    (length,) = struct.unpack("!i", await reader.readexactly(4))
    return kind, await reader.readexactly(length - 4)


class TransactionPooler:
    """Lends its one session to a client until the client's transaction ends.

    Args:
        url: of a server that asks for no password.

    Attributes:
        url: of the pooler.
        said: the bytes that clients sent to the server.
    """

    def __init__(self, url: str) -> None:
        self._parts = urlsplit(url)
        self._turn = asyncio.Lock()
        self.said = b""
        self._clients: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._from_server, self._to_server = await asyncio.open_connection(
            self._parts.hostname, self._parts.port
        )
        names = ("user", self._parts.username or "", "database", self._parts.path[1:], "")
        startup = struct.pack("!i", 196608) + "\0".join(names).encode() + b"\0"
        self._to_server.write(struct.pack("!i", len(startup) + 4) + startup)
        while (await _read(self._from_server))[0] != b"Z":
            pass
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = self._listener.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._listener.close()
        for writer in (*self._clients, self._to_server):
            writer.transport.abort()

    @property
    def url(self) -> str:
        return urlunsplit(
            self._parts._replace(netloc=f"{self._parts.username}@127.0.0.1:{self._port}")
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients.add(writer)
        try:
            await self._greet(reader, writer)
            while True:
                kind, body = await _read(reader)
                if kind == b"X":
                    break
                async with self._turn:
                    await self._lend(kind, body, reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            pass  # The client closed its connection, or the test is over.
        finally:
            self._clients.discard(writer)
            writer.transport.abort()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            length, code = struct.unpack("!ii", await reader.readexactly(8))
            await reader.readexactly(length - 8)
            if code not in _ENCRYPTION_REQUESTS:
                break
            writer.write(b"N")
        writer.write(_message(b"R", struct.pack("!i", 0)))
        for name, value in _PARAMETERS.items():
            writer.write(_message(b"S", f"{name}\0{value}\0".encode()))
        writer.write(_message(b"K", secrets.token_bytes(8)))
        writer.write(_message(b"Z", b"I"))

    async def _lend(
        self, kind: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Forward messages both ways until the server is outside of a transaction."""
        while True:
            self.said += body
            self._to_server.write(_message(kind, body))
            if kind in {b"Q", b"S"}:
                status = await self._answer(writer)
                if status == b"I":
                    return
            kind, body = await _read(reader)

    async def _answer(self, writer: asyncio.StreamWriter) -> bytes:
        while True:
            kind, body = await _read(self._from_server)
            writer.write(_message(kind, body))
            if kind == b"Z":
                return body
