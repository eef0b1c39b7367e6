"""The shared Redis client, against servers that are well, and that are not."""

import asyncio
import random
import shutil
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest
import uvloop
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError
from structlog.testing import capture_logs

from autoflow_worker.broker.channel import REPLY_PATIENCE
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.errors import RedisUnavailableError
from tests.support.configured import ConfiguredRedis
from tests.support.proxy import Proxy
from tests.support.servers import OwnServer
from tests.support.until import PATIENCE, until

Connect = Callable[[str], Awaitable[PipelinedRedis]]


@asynccontextmanager
async def connected(url: str, timeout: float = PATIENCE) -> AsyncIterator[PipelinedRedis]:
    """An open client, closed afterwards."""
    client = PipelinedRedis(url)
    try:
        await client.open(timeout)
        yield client
    finally:
        await client.aclose()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands wait for a connection as long as a busy machine needs to start a server."""
    monkeypatch.setattr("autoflow_worker.broker.channel.CONNECT_PATIENCE", PATIENCE)


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Open clients; all of them are closed at the end."""
    async with AsyncExitStack() as stack:
        yield lambda url: stack.enter_async_context(connected(url))


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
        assert channel.is_connected


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


# -- servers that are unwilling --------------------------------------------------------------------


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


# -- addresses -------------------------------------------------------------------------------------


async def test_a_database_number(connect: Connect, redis_url: str, prefix: str) -> None:
    third = redis_url.removesuffix("/0") + "/3"
    client = await connect(third)
    await client.set(prefix, "there")
    async with Redis.from_url(third) as there, Redis.from_url(redis_url) as elsewhere:
        assert await there.delete(prefix) == 1
        assert await elsewhere.exists(prefix) == 0


async def test_a_url_without_scheme_and_with_options_of_ioredis(
    connect: Connect, redis_url: str, prefix: str
) -> None:
    address = urlsplit(redis_url).netloc
    client = await connect(f"{address}/3?lazyConnect=true&connectTimeout=5000&family=4")
    await client.set(f"{prefix}:number", "3")
    async with Redis.from_url(f"redis://{address}/3", decode_responses=True) as plain:
        assert await plain.get(f"{prefix}:number") == "3"


async def test_the_family_of_addresses(connect: Connect, redis_url: str) -> None:
    port = urlsplit(redis_url).port  # of a server that listens on 127.0.0.1 alone
    client = await connect(f"redis://localhost:{port}?family=4")
    assert await client.ping()
    with pytest.raises(RedisUnavailableError):
        async with connected(f"redis://127.0.0.1:{port}?family=6", timeout=0.1):
            pass


async def test_a_database_that_there_is_not(redis_url: str) -> None:
    with pytest.raises(RedisUnavailableError, match="out of range"):
        async with connected(redis_url.removesuffix("/0") + "/99", timeout=0.1):
            pass


async def test_a_unix_socket() -> None:
    server = ConfiguredRedis()
    own = OwnServer(server)
    try:
        await own.start()
        async with connected(f"unix://{server.unix_socket}?db=2") as client:
            await client.set("key", "value")
            await own.kill()
            await until(lambda: not client.is_connected)
            await own.start()
            assert await client.get("key") == "value"
    finally:
        await own.close()


async def test_a_user_and_a_wrong_password(own_redis: OwnServer) -> None:
    password = "p@ss:w/rd %41é"
    async with Redis.from_url(own_redis.url) as admin:
        await admin.acl_setuser(
            "worker", enabled=True, passwords=[f"+{password}"], keys=["*"], categories=["+@all"]
        )
    address = own_redis.url.removeprefix("redis://")
    async with connected(f"redis://worker:{quote(password, safe='')}@{address}") as client:
        assert await client.acl_whoami() == "worker"
    with pytest.raises(RedisUnavailableError, match="refuses the connection") as refused:
        async with connected(f"redis://worker:guess@{address}"):
            pass
    assert "guess" not in str(refused.value)


async def test_a_password_that_is_needed_and_not_given(own_redis: OwnServer) -> None:
    async with Redis.from_url(own_redis.url) as admin:
        await admin.config_set("requirepass", "secret")
    with pytest.raises(RedisUnavailableError, match="refuses the connection"):
        async with connected(own_redis.url):
            pass
    address = own_redis.url.removeprefix("redis://")
    async with connected(f"redis://:secret@{address}") as client:
        assert await client.ping()


@pytest.mark.parametrize("url", ["http://127.0.0.1", ""])
def test_a_url_of_another_kind(url: str) -> None:
    with pytest.raises(ValueError, match="scheme"):
        PipelinedRedis(url)


async def test_nobody_is_there(connect: Connect, own_redis: OwnServer) -> None:
    await own_redis.stop()
    with pytest.raises(RedisUnavailableError, match="within"):
        async with connected(own_redis.url, timeout=0.2):
            pass


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_tls(loop: str, redis_url: str, tmp_path: Path) -> None:
    """No server out of a wheel is built with TLS; so a proxy speaks it in front of one."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
    files = ("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate)
    quiet = asyncio.subprocess.DEVNULL
    openssl = await asyncio.create_subprocess_exec(*command.split(), *files, stderr=quiet)
    assert await openssl.wait() == 0
    story = speak_tls(redis_url, key, certificate)
    if loop == "asyncio":
        await story
    else:
        # In a thread, as this test's own loop runs here.
        await asyncio.to_thread(uvloop.run, story)


async def speak_tls(redis_url: str, key: Path, certificate: Path) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    async with Proxy(redis_url, tls) as proxy:
        url = proxy.url.replace("redis://", "rediss://")
        async with connected(f"{url}?ssl_ca_certs={certificate}&family=4") as client:
            replies = await asyncio.gather(*(client.echo(str(n)) for n in range(50)))
            assert replies == [str(n) for n in range(50)]
            proxy.cut()
            await until(lambda: not client.is_connected)
            assert await client.echo("again") == "again"
        with pytest.raises(RedisUnavailableError, match="certificate"):
            async with connected(url, timeout=0.1):
                pass
