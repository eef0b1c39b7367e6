"""The shared Redis client and what REDIS_URL can say: addresses, databases, users and TLS."""

import asyncio
import shutil
import ssl
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import uvloop
from redis.asyncio import Redis

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.errors import RedisUnavailableError
from tests.support.clients import Connect, connected
from tests.support.configured import ConfiguredRedis
from tests.support.proxy import Proxy
from tests.support.servers import OwnServer
from tests.support.until import until


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
