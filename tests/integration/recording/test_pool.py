"""The pool of connections: what who waits is told, and how a broken connection is replaced."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit, urlunsplit

import psycopg
import pytest
import uvloop

from autoflow_worker.errors import DatabaseUnavailableError
from autoflow_worker.outage import Silence
from autoflow_worker.recording.pool import Checkout, Pool
from autoflow_worker.recording.recorder import StatusRecorder
from tests.support.database import Connection, Database, other_database
from tests.support.recording import active, write


@asynccontextmanager
async def opened(url: str, size: int = 1) -> AsyncIterator[Pool]:
    pool = Pool(url, size)
    await pool.open(30)
    try:
        yield pool
    finally:
        await pool.close()


async def test_no_more_connections_than_its_size(db: Database) -> None:
    async with opened(db.url, 2) as pool:
        first, second = await pool.take(), await pool.take()
        third = asyncio.create_task(pool.take())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await asyncio.shield(third)
        await pool.put_back(first)
        assert await third is first
        for connection in (first, second):
            await pool.put_back(connection)


async def test_a_closed_connection_is_replaced(db: Database) -> None:
    async with opened(db.url) as pool:
        first = await pool.take()
        await first.close()
        await pool.put_back(first)
        async with pool.connection() as second:
            assert second is not first
            await second.execute("SELECT 1")


async def test_who_waits_is_told_why_there_is_no_connection(db: Database) -> None:
    async with opened(db.url, 2) as pool:
        kept = await pool.take()
        await allow_connections(db, allowed=False)
        try:
            # Each of them hears of each attempt, and the pool goes on trying.
            for _ in range(4):
                waiting = [pool.take() for _ in range(3)]
                for error in await asyncio.gather(*waiting, return_exceptions=True):
                    assert isinstance(error, psycopg.OperationalError)
                    assert "not currently accepting connections" in str(error)
            assert pool.failure is not None
        finally:
            await allow_connections(db, allowed=True)
        # An attempt may have begun before that, and fail.
        async with asyncio.timeout(30):
            while True:
                try:
                    connection = await pool.take()
                except psycopg.OperationalError:
                    continue
                break
        for each in (connection, kept):
            await pool.put_back(each)


async def allow_connections(db: Database, *, allowed: bool) -> None:
    name = db.url.rpartition("/")[2]
    # A database can't be closed from inside.
    async with await psycopg.AsyncConnection.connect(
        other_database(db.url, "postgres"), autocommit=True
    ) as connection:
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {allowed}'.encode())


async def test_a_refusal_is_told_at_once(db: Database) -> None:
    pool = Pool(other_database(db.url, "no-such-database"), 1)
    with pytest.raises(DatabaseUnavailableError, match=r"refuses the connection: .*does not exist"):
        await pool.open(3_600)


async def test_a_server_that_is_away_is_tried_for_a_while() -> None:
    pool = Pool("postgres://postgres@127.0.0.1:1/postgres", 1)
    with pytest.raises(DatabaseUnavailableError, match=r"within 0.2 s: .*onnection refused"):
        await pool.open(0.2)


# -- a server that hangs, or ends a connection -----------------------------------------------------


async def test_a_connection_that_ended_before_it_was_used(db: Database) -> None:
    """The server's last words and the reset of the connection come at once."""

    async def use() -> None:
        async with opened(db.url) as pool:
            async with await Connection.connect(db.url, autocommit=True) as other:
                await other.execute(
                    "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name = 'autoflow-worker'"
                )
            async with asyncio.timeout(30):
                with pytest.raises(psycopg.OperationalError):
                    await Checkout(pool, Silence("silent", "answers")).link()

    await use()
    await asyncio.to_thread(uvloop.run, use())


@asynccontextmanager
async def relay(
    url: str,
    *,
    asks: Callable[[bytes], bytes] = bytes,
    answers: Callable[[bytes], bytes | None] = bytes,
) -> AsyncIterator[tuple[str, list[asyncio.StreamWriter]]]:
    """Pass on what `asks` and `answers` leave of it; its URL, and the clients so far.

    A client whose answer is None gets no more.
    """
    address = urlsplit(url)
    clients: list[asyncio.StreamWriter] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(asks(data))

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        clients.append(to_client)
        server, to_server = await asyncio.open_connection(address.hostname, address.port)
        asking = asyncio.create_task(pass_on(client, to_server))
        asking.add_done_callback(lambda _: to_server.close())
        while data := await server.read(65_536):
            left = answers(data)
            to_client.write(left if left is not None else data.removesuffix(READY))
            if left is None:
                break
        to_client.close()
        asking.cancel()

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = proxy.sockets[0].getsockname()[1]
    netloc = address.netloc.replace(f":{address.port}", f":{port}")
    try:
        yield urlunsplit(address._replace(netloc=netloc)), clients
    finally:
        proxy.close()


READY = b"Z\x00\x00\x00\x05I"


async def test_giving_up_a_connection_that_hangs_asks_nobody(db: Database) -> None:
    """psycopg itself would connect once more, to have the statement cancelled, and wait for it."""
    hanging = asyncio.Event()

    def asks(data: bytes) -> bytes:
        if b"lock_timeout" in data:
            hanging.set()
            return b""
        return data

    async with relay(db.url, asks=asks) as (url, clients):
        keeper = StatusRecorder(url)
        await keeper.open(30)
        held = keeper.submit(write("no-row", active()))
        await hanging.wait()
        await keeper.close(0)
        assert held.settled.cancelled()
        assert len(clients) == 1


async def test_a_connection_that_ends_with_an_error_is_used_no_more(db: Database) -> None:
    """The error may be one that a single row is to blame for; the next statement must not be."""

    def answers(data: bytes) -> bytes | None:
        return None if b"C22012" in data else data  # division by zero

    async with relay(db.url, answers=answers) as (url, _), opened(url) as pool:
        checkout = Checkout(pool, Silence("silent", "answers"))
        link = await checkout.link()
        with pytest.raises(psycopg.errors.DivisionByZero):
            await link.execute("SELECT 1 / 0")
        with pytest.raises(psycopg.OperationalError) as lost:
            await link.execute("SELECT 1")
        assert lost.value.sqlstate is None
        await checkout.replace()
        link = await checkout.link()
        assert len(await link.execute("SELECT 1")) == 1
        await checkout.close()
