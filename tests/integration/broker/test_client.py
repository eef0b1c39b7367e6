"""The shared Redis client: replies, lost connections and silent servers."""

import asyncio
import random
import socket
import time

import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from autoflow_worker.broker.channel import REPLY_PATIENCE
from autoflow_worker.broker.client import PipelinedRedis
from tests.support.clients import Connect, connected
from tests.support.proxy import Proxy
from tests.support.servers import OwnServer
from tests.support.until import until


async def keeps_answering(client: PipelinedRedis, key: str = "key") -> bool:
    """Whether a command is answered now; the connection may just be broken."""
    try:
        await client.incr(key)
    except RedisConnectionError:
        return False
    return True


# -- replies ---------------------------------------------------------------------------------------


async def test_commands_of_one_turn_leave_in_one_write(redis_url: str, prefix: str) -> None:
    async with Proxy(redis_url) as proxy, connected(proxy.url) as client:
        proxy.chunks.clear()
        replies = await asyncio.gather(*(client.incr(f"{prefix}:n") for _ in range(100)))
        assert replies == list(range(1, 101))
        assert proxy.chunks == [100]


async def test_cancelled_callers_never_shift_replies(redis_url: str) -> None:
    draw = random.Random(3)
    async with connected(redis_url) as client:

        async def ask(word: str) -> str:
            reply = await client.echo(word)
            assert reply == word
            return word

        finished = 0
        for batch in range(30):
            calls = [asyncio.create_task(ask(f"{batch}-{n}")) for n in range(20)]
            # At different moments: not yet sent, on the way, already answered.
            for _ in range(draw.randrange(6)):
                await asyncio.sleep(0)
            for call in draw.sample(calls, 10):
                call.cancel()
            results = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(r, str | asyncio.CancelledError) for r in results), results
            finished += sum(isinstance(r, str) for r in results)
        assert finished >= 300
        assert await ask("the last") == "the last"


async def test_an_error_is_its_callers_alone(connect: Connect, redis_url: str, prefix: str) -> None:
    client = await connect(redis_url)
    key = f"{prefix}:list"
    replies = await asyncio.gather(
        client.rpush(key, "a"), client.incr(key), client.llen(key), return_exceptions=True
    )
    assert replies[0] == replies[2] == 1
    assert isinstance(replies[1], ResponseError)


async def test_a_script_unknown_to_the_server_is_loaded(connect: Connect, redis_url: str) -> None:
    client = await connect(redis_url)
    script = client.register_script(f"return ARGV[1] -- {random.random()}")
    assert await asyncio.gather(*(script(args=[n]) for n in range(3))) == ["0", "1", "2"]
    assert client.register_script(script.script) is script


async def test_bytes_outside_utf8_come_back_as_they_went(
    connect: Connect, redis_url: str, redis: Redis, prefix: str
) -> None:
    client = await connect(redis_url)
    raw = bytes(range(256)) + "é€😀".encode()
    async with Redis.from_url(redis_url) as binary:
        await binary.set(f"{prefix}:raw", raw)
        text = await client.get(f"{prefix}:raw")
        assert isinstance(text, str)
        await client.set(f"{prefix}:copy", text)
        assert await binary.get(f"{prefix}:copy") == raw
    await client.set(f"{prefix}:text", "é€😀\0\r\n")
    assert await redis.get(f"{prefix}:text") == "é€😀\0\r\n"


async def test_large_values(connect: Connect, redis_url: str, prefix: str) -> None:
    client = await connect(redis_url)
    large = "x" * 5_000_000
    key = f"{prefix}:large"
    await client.set(key, large)
    replies = await asyncio.gather(client.get(key), client.ping(), client.get(key))
    assert list(replies) == [large, True, large]
    await client.delete(key)


# -- lost connections ------------------------------------------------------------------------------


async def test_a_killed_connection_is_replaced(
    connect: Connect, redis_url: str, redis: Redis, prefix: str
) -> None:
    client = await connect(redis_url)
    for _ in range(3):
        before = await client.client_id()
        await redis.client_kill_filter(_id=str(before))
        await until(lambda: keeps_answering(client, f"{prefix}:n"))
        assert await client.client_id() != before
    assert not any(death.done() for death in client.deaths())


async def test_what_was_in_flight_fails_and_is_not_repeated(
    redis_url: str, redis: Redis, prefix: str
) -> None:
    async with Proxy(redis_url) as proxy, connected(proxy.url) as client:
        lost = proxy.lose_reply_to(prefix.encode())
        calls = [client.incr(f"{prefix}:n"), client.echo("neighbour")]
        replies = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(reply, RedisConnectionError) for reply in replies)
        assert await client.echo("next") == "next"
        assert lost.count == 1
        assert await redis.get(f"{prefix}:n") == "1"


async def test_a_cut_between_write_and_reply_of_many(redis_url: str, prefix: str) -> None:
    """Connections that break at any moment leave no caller without an answer."""
    draw = random.Random(5)
    async with Proxy(redis_url) as proxy, connected(proxy.url) as client:
        for _ in range(30):
            calls = [asyncio.ensure_future(client.incr(f"{prefix}:n")) for _ in range(5)]
            for _ in range(draw.randrange(12)):
                await asyncio.sleep(0)
            proxy.cut()
            calls += [asyncio.ensure_future(client.incr(f"{prefix}:n")) for _ in range(5)]
            async with asyncio.timeout(60):
                replies = await asyncio.gather(*calls, return_exceptions=True)
            assert all(isinstance(r, int | RedisConnectionError) for r in replies), replies
        await until(lambda: keeps_answering(client))


async def test_commands_wait_for_a_server_that_restarts(
    connect: Connect, own_redis: OwnServer
) -> None:
    client = await connect(own_redis.url)
    for end in (own_redis.stop, own_redis.kill):
        await client.set("key", "value")
        await end()
        await until(lambda: not client.is_connected)
        waiting = [asyncio.ensure_future(client.get("key")) for _ in range(3)]
        await own_redis.start()
        assert await asyncio.gather(*waiting) == ["value"] * 3


async def test_commands_wait_no_longer_than_they_should(
    connect: Connect, own_redis: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.broker.channel.CONNECT_PATIENCE", 0.2)
    client = await connect(own_redis.url)
    await own_redis.stop()
    await until(lambda: not client.is_connected)
    with pytest.raises(RedisConnectionError, match="no connection to Redis"):
        await client.ping()


async def test_a_server_that_answers_nothing_is_given_up(
    own_redis: OwnServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.broker.client.HANDSHAKE_TIMEOUT", 2.0)
    client = await connect(own_redis.url)
    own_redis.suspend()
    with pytest.raises(RedisConnectionError, match="no reply"):
        await client.shared.execute(("PING",), patience=0.3)
    assert not client.is_connected
    own_redis.resume()
    assert await client.ping()


async def test_a_half_open_connection_is_replaced(redis_url: str) -> None:
    """The server's machine is gone without a word; another one has its address."""
    async with Proxy(redis_url) as proxy, connected(proxy.url) as client:
        proxy.freeze()
        with pytest.raises(RedisConnectionError, match="no reply"):
            await client.shared.execute(("PING",), patience=0.3)
        assert await client.ping()
        assert proxy.accepted == 2


async def test_the_kernel_looks_after_idle_connections(connect: Connect, redis_url: str) -> None:
    """A peer whose machine is gone answers no probe; what has its address now refuses them."""
    client = await connect(redis_url)
    link = client.shared.link
    assert link is not None
    plug = link.transport.get_extra_info("socket")
    assert plug.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    if hasattr(socket, "TCP_KEEPIDLE"):
        assert plug.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 3


async def test_a_blocking_command_is_not_taken_for_silence(redis_url: str, prefix: str) -> None:
    async with connected(redis_url) as client:
        channel = await client.open_blocking_channel("blocks", 60)
        command = ("BZPOPMIN", f"{prefix}:marker", 1.5)
        assert await channel.execute(command, patience=1.5 + 10.0) is None
        assert channel.link is not None


async def test_silence_is_told_once_for_all_connections(
    own_redis: OwnServer, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.broker.channel.SILENT_AFTER", 0.5)
    client = await connect(own_redis.url)
    channel = await client.open_blocking_channel("blocks", 5)
    patience = 2.5 + REPLY_PATIENCE
    with capture_logs() as log:
        # Blocking is no silence, also where it takes longer.
        assert await channel.execute(("BZPOPMIN", "marker", 2.5), patience=patience) is None
        assert log == []
        own_redis.suspend()
        waiting = [asyncio.ensure_future(client.echo(word)) for word in ("a", "b")]
        blocked = asyncio.ensure_future(channel.execute(("BZPOPMIN", "marker", 0.1), patience=10.1))
        # Longer than `SILENT_AFTER` and the second between two checks.
        await until(lambda: min(client.shared.silent_for, channel.silent_for) > 2, 30)
        own_redis.resume()
        assert await asyncio.gather(*waiting) == ["a", "b"]
        await blocked
    assert [entry["event"] for entry in log] == ["redis_silent", "redis_answers_again"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_blocked_loop_is_not_the_servers_silence(
    redis_url: str, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.broker.channel.SILENT_AFTER", 1.5)

    here, there = socket.socketpair()

    def block() -> None:
        here.recv(1)
        time.sleep(3)

    async def story() -> None:
        async with connected(redis_url) as client:
            # uvloop looks at its timers next, and only then at what has come.
            asyncio.get_running_loop().add_reader(here, block)
            for _ in range(2):
                there.send(b"!")
                assert await client.echo("word") == "word"
            asyncio.get_running_loop().remove_reader(here)

    with here, there, capture_logs() as log:
        if loop == "asyncio":
            await story()
        else:
            await asyncio.to_thread(uvloop.run, story())
    assert log == []


async def test_a_client_that_is_closed_says_so(redis_url: str) -> None:
    client = PipelinedRedis(redis_url)
    await client.open(60)
    pending = client.shared.execute(("BLPOP", "nothing", 0))
    await client.aclose()
    with pytest.raises(RedisConnectionError, match="is closed"):
        await pending
    with pytest.raises(RedisConnectionError, match="is closed"):
        await client.ping()
    await client.aclose()
