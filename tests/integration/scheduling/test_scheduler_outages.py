"""What a scheduler does while a server is away, refuses, or loses a reply."""

import asyncio

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskScheduler
from autoflow_worker.errors import (
    DatabaseUnavailableError,
    DatabaseUnfitError,
    RedisUnavailableError,
    RedisUnfitError,
)
from tests.support.database import Database
from tests.support.node import Node
from tests.support.proxy import Proxy
from tests.support.running import RunWorker
from tests.support.scheduling import (
    impatience,
    job_ids,
    plain,
)
from tests.support.servers import OwnServer
from tests.support.until import until


async def test_an_unreachable_redis(database_url: str, db: Database) -> None:
    scheduler = TaskScheduler(redis_url="redis://127.0.0.1:1", database_url=database_url)
    with pytest.raises(RedisUnavailableError):
        await scheduler.open(0.1)


async def test_an_unreachable_database(redis_url: str) -> None:
    url = "postgresql://x:S3cret@127.0.0.1:1/x"
    scheduler = TaskScheduler(redis_url=redis_url, database_url=url)
    with pytest.raises(DatabaseUnavailableError) as caught:
        await scheduler.open()
    assert "S3cret" not in str(caught.value)


async def test_redis_away_before_anything_is_written(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler:
        await own_redis.stop()
        with impatience(), pytest.raises(RedisUnavailableError):
            await scheduler.schedule(plain, {})
        assert await db.rows() == {}
        await own_redis.start()
        assert await scheduler.schedule(plain, {}) in await db.rows()


async def test_redis_that_refuses_for_a_while(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with (
        TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler,
        Redis.from_url(own_redis.url) as client,
    ):
        await client.config_set("maxmemory", 1)
        scheduling = asyncio.create_task(scheduler.schedule(plain, {}))
        await until(db.rows)
        await client.config_set("maxmemory", 0)
        task_id = await scheduling
        assert await db.status(task_id) == "pending"
        assert await client.exists(f"bull:anything:{task_id}")


async def test_redis_that_refuses_for_good(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with (
        TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler,
        Redis.from_url(own_redis.url) as client,
    ):
        await client.config_set("maxmemory", 1)
        with impatience(), pytest.raises(RedisUnavailableError, match="could not be added"):
            await scheduler.schedule(plain, {}, delay_ms=1000)
        [task_id] = await db.rows()
        task = await db.task(task_id)
        assert (task.status, task.attempts, task.externalId) == ("failed", 0, None)
        assert task.failedAt is not None
        assert task.error is not None
        assert task.error.reason.startswith("the job could not be added: OOM")


async def test_a_queue_that_can_not_take_jobs(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    await redis.set(f"{prefix}:anything:prioritized", "no sorted set")
    with pytest.raises(RedisUnfitError, match="WRONGTYPE"):
        await scheduler.schedule(plain, {})
    assert await db.statuses() == {"failed": 1}


async def test_a_lost_reply_is_no_lost_job_and_no_second_one(
    redis_url: str, redis: Redis, database_url: str, db: Database, *, prefix: str, node5: Node
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(redis_url=proxy.url, database_url=database_url, prefix=prefix) as scheduler,
    ):
        ambush = proxy.lose_reply_to(b"the-lost-one")
        task_id = await scheduler.schedule(plain, {"which": "the-lost-one"})
        assert ambush.count >= 2
    assert await job_ids(redis, prefix) == {task_id}
    assert await node5.get_state("anything", task_id) == "prioritized"
    assert (await db.task(task_id)).externalId == task_id


async def test_a_job_of_unknown_fate_that_exists_after_all(
    redis_url: str,
    database_url: str,
    db: Database,
    *,
    prefix: str,
    run_worker: RunWorker,
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(redis_url=proxy.url, database_url=database_url, prefix=prefix) as scheduler,
    ):
        proxy.lose_reply_to(b"the-lost-one")
        await proxy.refuse()
        with impatience(), pytest.raises(RedisUnavailableError):
            await scheduler.schedule(plain, {"which": "the-lost-one"})
    [task_id] = await db.rows()
    assert await db.status(task_id) == "failed"
    async with run_worker([plain]):
        task = await db.until_status(task_id, "completed")
    assert (task.error, task.failedAt) == (None, None)


async def test_a_caller_that_is_cancelled_leaves_a_task_that_runs(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    for turns in range(30):
        call = asyncio.create_task(scheduler.schedule(plain, {"turns": turns}))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await scheduler.close()
    rows = await db.rows()
    assert await job_ids(redis, prefix) == rows.keys()
    assert rows
    assert all(row["externalId"] == task_id for task_id, row in rows.items())


async def test_a_cancelled_caller_whose_job_can_not_be_added(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler:
        async with Redis.from_url(own_redis.url) as client:
            await client.config_set("maxmemory", 1)
        with impatience():
            call = asyncio.create_task(scheduler.schedule(plain, {}))
            await asyncio.sleep(0)  # It has begun.
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await scheduler.close()
    assert await db.statuses() == {"failed": 1}


async def test_a_connection_to_postgresql_that_breaks(
    scheduler: TaskScheduler, db: Database
) -> None:
    await scheduler.schedule(plain, {})
    for _ in range(3):
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        task_id = await scheduler.schedule(plain, {})
        assert (await db.task(task_id)).externalId == task_id


async def test_postgresql_away(
    own_postgres: OwnServer, redis_url: str, redis: Redis, prefix: str
) -> None:
    async with TaskScheduler(
        redis_url=redis_url, database_url=own_postgres.url, prefix=prefix
    ) as scheduler:
        await own_postgres.stop()
        with impatience(), pytest.raises(DatabaseUnavailableError):
            await scheduler.schedule(plain, {})
        assert await job_ids(redis, prefix) == set()
        await own_postgres.start()
        task_id = await scheduler.schedule(plain, {})
        assert await job_ids(redis, prefix) == {task_id}


async def test_postgresql_away_after_the_job_was_added(
    own_postgres: OwnServer, redis_url: str, redis: Redis, prefix: str
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(
            redis_url=proxy.url, database_url=own_postgres.url, prefix=prefix
        ) as scheduler,
    ):
        ambush = proxy.hold_reply_to(b"the-held-one")
        scheduling = asyncio.create_task(scheduler.schedule(plain, {"which": "the-held-one"}))
        await ambush.sprung.wait()
        await own_postgres.stop()
        ambush.release()
        with impatience():
            task_id = await scheduling
        assert await job_ids(redis, prefix) == {task_id}
    await own_postgres.start()


async def test_a_database_without_the_table(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    await db.execute("DROP TABLE tasks")
    with pytest.raises(DatabaseUnfitError, match='"tasks" does not exist'):
        await scheduler.schedule(plain, {})
    assert await job_ids(redis, prefix) == set()
