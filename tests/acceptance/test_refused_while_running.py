"""A server that refuses for good ends the worker with exit code 3; one that is away does not."""

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from tests.support.database import Database, check_rows, open_database
from tests.support.node import Node
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.servers import OwnServer
from tests.support.until import until

TASKS = """
    import asyncio
    from pathlib import Path
    from autoflow_worker import TaskOptions, define_task

    async def handler(payload, ctx):
        while payload.get("held") and not Path("go-on").exists():
            await asyncio.sleep(0.01)

    tasks = [define_task("mails", handler, TaskOptions(concurrency=3, timeout_ms=None))]
"""
SECRET = "S3cr3t"
QUICK = {"WORKER_STARTUP_TIMEOUT": "2"}


async def reason_of(worker: WorkerProcess) -> str:
    """Wait for its end with exit code 3; the reason that it gives."""
    assert await worker.wait(60) == 3, worker.report()
    assert "Traceback" not in worker.stderr
    assert SECRET not in worker.stdout + worker.stderr
    [line] = [li for li in worker.stderr.splitlines() if li.startswith("autoflow-worker: ")]
    assert "refused for 2 s" in line
    assert worker.logged("worker_stopped")
    return line


# -- PostgreSQL ------------------------------------------------------------------------------------


@asynccontextmanager
async def app_of(server: OwnServer) -> AsyncIterator[tuple[Database, str]]:
    """The database as its owner sees it, and the URL of a user with a password and all rights."""
    rules = "host all app all scram-sha-256\nlocal all app scram-sha-256\n"
    async with open_database(server.url) as db:
        await db.execute(f"CREATE ROLE app LOGIN PASSWORD '{SECRET}'")
        await db.execute("GRANT USAGE ON SCHEMA public TO app")
        await db.execute("GRANT SELECT, INSERT, UPDATE ON tasks TO app")
        [[file]] = await db.fetch("SHOW hba_file")
        Path(file).write_text(rules + Path(file).read_text())  # noqa: ASYNC240 - a small file
        await db.execute("SELECT pg_reload_conf()")
        user = urlsplit(server.url).username
        yield db, server.url.replace(f"{user}@", f"app:{SECRET}@")


async def cut_off(db: Database) -> None:
    await db.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")


async def revoke_update(db: Database) -> None:
    await db.execute("REVOKE UPDATE ON tasks FROM app")


async def change_password(db: Database) -> None:
    await db.execute("ALTER USER app PASSWORD 'another'")
    await cut_off(db)


async def rename_table(db: Database) -> None:
    await db.execute("ALTER TABLE tasks RENAME TO tasks_of_old")


async def take_login(db: Database) -> None:
    await db.execute("ALTER USER app NOLOGIN")
    await cut_off(db)


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (revoke_update, "the user lacks UPDATE on tasks"),
        (change_password, "password authentication failed"),
        (rename_table, "there is no table 'tasks'"),
        (take_login, "is not permitted to log in"),
    ],
)
async def test_postgresql_refuses_for_good(
    worker_process: WorkerStarter,
    own_postgres: OwnServer,
    node5: Node,
    redis: Redis,
    tmp_path: Path,
    *,
    prefix: str,
    refuse: Callable[[Database], Any],
    words: str,
) -> None:
    async with app_of(own_postgres) as (db, url):
        worker = worker_process(TASKS, DATABASE_URL=url, **QUICK)
        await worker.until_logged("worker_started")
        await db.insert_task("mails", {"held": True}, task_id="a-job")
        await node5.schedule("mails", {"held": True}, task_id="a-job")
        await db.until_status("a-job", "active")
        await refuse(db)
        (tmp_path / "go-on").touch()
        assert words in await reason_of(worker)
        # Its outcome was not recorded, so BullMQ was not told: it runs again.
        assert await redis.zcard(f"{prefix}:mails:completed") == 0
        assert await redis.llen(f"{prefix}:mails:active") == 0
        assert await redis.hexists(f"{prefix}:mails:a-job", "finishedOn") is False


async def test_a_right_that_comes_back_in_time(
    worker_process: WorkerStarter, own_postgres: OwnServer, node5: Node
) -> None:
    async with app_of(own_postgres) as (db, url):
        worker = worker_process(TASKS, DATABASE_URL=url)
        await worker.until_logged("worker_started")
        await change_password(db)
        await db.insert_task("mails", {}, task_id="a-job")
        await node5.schedule("mails", {}, task_id="a-job")
        await until(lambda: "password authentication failed" in worker.stdout + worker.stderr, 30)
        await db.execute(f"ALTER USER app PASSWORD '{SECRET}'")
        await db.until_status("a-job", "completed", timeout=30)
        worker.terminate()
        assert await worker.wait() == 0


async def test_postgresql_away_is_waited_for(
    worker_process: WorkerStarter, own_postgres: OwnServer, node5: Node
) -> None:
    """However long it takes, and each reason is told once."""
    worker = worker_process(TASKS, DATABASE_URL=own_postgres.url, WORKER_STARTUP_TIMEOUT="0.5")
    await worker.until_logged("worker_started")
    async with open_database(own_postgres.url) as db:
        await db.insert_task("mails", {}, task_id="a-job")
    await own_postgres.stop()
    await node5.schedule("mails", {}, task_id="a-job")
    await worker.until_logged("postgresql_away")
    over = time.monotonic() + 2
    await until(lambda: time.monotonic() > over)
    await own_postgres.start()
    async with open_database(own_postgres.url) as db:
        await db.until_status("a-job", "completed", timeout=30)
    reasons = [entry["reason"] for entry in worker.logged("postgresql_away")]
    assert len(set(reasons)) == len(reasons), reasons
    worker.terminate()
    assert await worker.wait() == 0
    await check_rows(own_postgres.url)


# -- Redis -----------------------------------------------------------------------------------------


@asynccontextmanager
async def worker_user(server: OwnServer) -> AsyncIterator[tuple[Redis, str]]:
    """An administrator, and the URL of a user with a password and all rights."""
    async with Redis.from_url(server.url, decode_responses=True) as admin:
        await set_user(admin, f">{SECRET}", "~*", "+@all")
        yield admin, server.url.replace("redis://", f"redis://worker:{SECRET}@")


async def set_user(admin: Redis, *rules: str) -> None:
    await admin.execute_command("ACL", "SETUSER", "worker", "on", *rules)  # type: ignore[no-untyped-call]


async def change_redis_password(admin: Redis) -> None:
    await set_user(admin, "resetpass", ">another")
    await admin.client_kill_filter(user="worker")


async def forbid_scripts(admin: Redis) -> None:
    await set_user(admin, "-evalsha")


async def forbid_blocking(admin: Redis) -> None:
    await set_user(admin, "-bzpopmin")


async def forbid_keys(admin: Redis) -> None:
    await set_user(admin, "resetkeys", "~another:*")


async def delete_user(admin: Redis) -> None:
    await admin.acl_deluser("worker")


@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        (change_redis_password, "invalid username-password pair"),
        (delete_user, "invalid username-password pair"),
        (forbid_scripts, "may not run EVALSHA"),
        (forbid_blocking, "may not run BZPOPMIN"),
        (forbid_keys, "may not use the keys"),
    ],
)
async def test_redis_refuses_for_good(
    worker_process: WorkerStarter,
    own_redis: OwnServer,
    refuse: Callable[[Redis], Any],
    words: str,
) -> None:
    async with worker_user(own_redis) as (admin, url):
        worker = worker_process(TASKS, REDIS_URL=url, **QUICK)
        await worker.until_logged("worker_started")
        await refuse(admin)
        assert words in await reason_of(worker)


async def test_redis_away_is_waited_for(
    worker_process: WorkerStarter, own_redis: OwnServer, db: Database
) -> None:
    worker = worker_process(TASKS, REDIS_URL=own_redis.url, WORKER_STARTUP_TIMEOUT="0.5")
    await worker.until_logged("worker_started")
    await own_redis.stop()
    # The reason has changed: first it was lost, now nobody is there.
    await worker.until_logged("redis_connection_failed")
    await own_redis.start()
    await worker.until_logged("redis_connection_restored")
    async with Redis.from_url(own_redis.url) as admin:
        await admin.config_set("maxmemory", 1)
        await db.insert_task("mails", {}, task_id="a-job")
        await worker.until_logged("redis_refuses_scripts")
        await admin.config_set("maxmemory", 0)
    worker.terminate()
    assert await worker.wait() == 0
