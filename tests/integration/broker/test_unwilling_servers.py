"""The shared Redis client and servers that answer, but serve nothing, or only nonsense."""

import asyncio
from collections.abc import AsyncIterator, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from autoflow_worker.errors import RedisUnavailableError
from tests.support.clients import Connect, connected
from tests.support.configured import ConfiguredRedis
from tests.support.proxy import Proxy
from tests.support.servers import OwnServer
from tests.support.until import until


async def test_a_replica_is_left_for_the_primary(own_redis: OwnServer, connect: Connect) -> None:
    client = await connect(own_redis.url)
    await client.set("key", "1")
    with capture_logs() as log:
        async with Redis.from_url(own_redis.url, decode_responses=True) as admin:
            await admin.replicaof("127.0.0.1", 1)
            with pytest.raises(RedisConnectionError, match="READONLY"):
                await client.set("key", "2")
            waiting = asyncio.ensure_future(client.set("key", "3"))
            # Each attempt to connect shows in the server's count.
            before = (await admin.info("stats"))["total_connections_received"]
            await until(lambda: connections_since(admin, before, 2))
            assert not waiting.done()
            await admin.replicaof("NO", "ONE")
        assert await waiting
    # However often it was tried: each reason is told once.
    assert_told_once(log)


def assert_told_once(log: Sequence[MutableMapping[str, Any]]) -> None:
    """One outage, with each of its reasons once, and its end."""
    first, *others, last = log
    assert first["event"] == "redis_connection_lost"
    assert {entry["event"] for entry in others} <= {"redis_connection_failed"}
    reasons = [entry["reason"] for entry in (first, *others)]
    assert len(set(reasons)) == len(reasons), reasons
    assert last["event"] == "redis_connection_restored"


async def connections_since(admin: Redis, before: int, more: int) -> bool:
    received: int = (await admin.info("stats"))["total_connections_received"]
    return received >= before + more


async def test_a_server_that_loads_is_waited_for(connect: Connect) -> None:
    server = ConfiguredRedis()
    own = OwnServer(server)
    try:
        await own.start()
        client = await connect(server.url)
        await client.set("key", "value")
        await server.load_slowly()
        with capture_logs() as log:
            await own.kill()
            await until(lambda: not client.is_connected)
            await own.start()
            async with Redis.from_url(server.url, retry=None) as admin:
                assert (await admin.info("persistence"))["loading"] == 1
            with pytest.raises(RedisUnavailableError, match="loading"):
                async with connected(server.url, timeout=0.2):
                    pass
            assert await client.get("key") == "value"
    finally:
        await own.close()
    assert_told_once(log)


@pytest.mark.parametrize("rubbish", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\xff\0", b"+OK\r\n"])
async def test_a_server_that_talks_rubbish_is_left(rubbish: bytes, redis_url: str) -> None:
    async with talking(rubbish) as port, Proxy(redis_url) as proxy, connected(proxy.url) as client:
        with pytest.raises(RedisUnavailableError):
            async with connected(f"redis://127.0.0.1:{port}", timeout=0.1):
                pass
        proxy.redirect(port)
        proxy.cut()
        # It is tried again and again, as another server may have the address tomorrow.
        await until(lambda: proxy.accepted > 3)
        proxy.redirect(port_of(redis_url))
        proxy.cut()
        assert await client.echo("fine") == "fine"


@asynccontextmanager
async def talking(rubbish: bytes) -> AsyncIterator[int]:
    """A port whose server has the same answer to every line."""
    clients: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        clients.append(writer)
        with suppress(OSError):
            # A client that has left may have asked for more: asyncio complains of such answers.
            while await reader.readline() and not writer.transport.is_closing():
                writer.write(rubbish)

    server = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for client in clients:
            client.transport.abort()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


async def test_rubbish_in_the_middle_of_a_connection(redis_url: str) -> None:
    async with Proxy(redis_url) as proxy, connected(proxy.url) as client:
        held = proxy.hold_reply_to(b"hold me")
        waiting = asyncio.ensure_future(client.echo("hold me"))
        await held.sprung.wait()
        link = client.shared.link
        assert link is not None
        link.data_received(b"!?\r\n")
        with pytest.raises(RedisConnectionError, match="not the Redis protocol"):
            await waiting
        held.release()
        assert await client.echo("fine") == "fine"


async def test_a_reply_that_nobody_asked_for_breaks_the_connection(redis_url: str) -> None:
    async with connected(redis_url) as client:
        link = client.shared.link
        assert link is not None
        link.data_received(b"+OK\r\n")
        assert not client.is_connected
        assert await client.echo("fine") == "fine"


async def test_a_server_that_takes_no_writes_is_told_once(
    own_redis: OwnServer, connect: Connect
) -> None:
    client = await connect(own_redis.url)
    write = client.register_script("return redis.call('INCR', KEYS[1])")
    read = client.register_script("return redis.call('GET', KEYS[1])")
    assert await write(keys=["n"]) == 1
    with capture_logs() as log:
        async with Redis.from_url(own_redis.url) as admin:
            await admin.config_set("maxmemory", 1)
            for _ in range(3):
                with pytest.raises(RedisConnectionError, match="OOM"):
                    await write(keys=["n"])
                assert await read(keys=["n"]) == "1"
            await admin.config_set("maxmemory", 0)
        assert await write(keys=["n"]) == 2
        assert await write(keys=["n"]) == 3
    events = [entry["event"] for entry in log]
    assert events == ["redis_refuses_scripts", "redis_takes_scripts_again"]


async def test_a_server_that_is_busy_with_a_script(own_redis: OwnServer, connect: Connect) -> None:
    client = await connect(own_redis.url)
    async with Redis.from_url(own_redis.url) as busy, Redis.from_url(own_redis.url) as admin:
        await admin.config_set("busy-reply-threshold", 10)
        endless = asyncio.ensure_future(busy.eval("while true do end", 0))

        async def is_busy() -> bool:
            try:
                await client.get("key")
            except RedisConnectionError as error:
                return "BUSY" in str(error)
            return False

        await until(is_busy)
        await admin.script_kill()
        with pytest.raises(ResponseError):
            await endless
    assert await client.set("key", "value")
    assert client.is_connected


async def test_a_password_that_is_changed_is_told_once(
    own_redis: OwnServer, connect: Connect
) -> None:
    address = own_redis.url.removeprefix("redis://")
    async with Redis.from_url(own_redis.url) as admin:
        await admin.acl_setuser(
            "worker", enabled=True, passwords=["+one"], keys=["*"], categories=["+@all"]
        )
        client = await connect(f"redis://worker:one@{address}")
        with capture_logs() as log:
            await admin.acl_setuser("worker", enabled=True, passwords=["-one", "+two"])
            await admin.client_kill_filter(_id=str(await client.client_id()))
            await until(lambda: len(log) == 2)
            await admin.acl_setuser("worker", enabled=True, passwords=["+one"])
            assert await client.ping()
    events = [entry["event"] for entry in log]
    assert events == [
        "redis_connection_lost",
        "redis_connection_refused",
        "redis_connection_restored",
    ]
    assert "one" not in str(log[1])
