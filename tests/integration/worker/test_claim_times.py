"""The time of a claim tells attempts apart, so it is taken when the job is claimed."""

import asyncio
import time
from typing import Any

from psycopg import AsyncConnection as Connection
from redis.asyncio import Redis

from autoflow_worker import TaskContext, define_task
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import running
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "q"
AWAY = 5.0
"""Seconds for which PostgreSQL is away: five times as long as a lock lasts."""


async def test_a_failure_that_waited_for_postgresql_does_not_date_the_next_claim_back(
    own_postgres: OwnServer, node5: Node, redis: Redis, redis_url: str, prefix: str
) -> None:
    raised = asyncio.Event()

    async def handler(payload: dict[str, Any], ctx: TaskContext) -> None:
        if payload["fails"] and ctx.attempt == 1:
            own_postgres.suspend()
            raised.set()
            raise ValueError("once")

    # The first to fail comes back long after the second has run.
    task = define_task(QUEUE, handler, worker_options={"lockDuration": 1_000})
    urls = {"redis_url": redis_url, "database_url": own_postgres.url, "prefix": prefix}
    first = Scheduled({"fails": True}, backoff=3_000)
    second = Scheduled({"fails": False})
    async with await Connection.connect(own_postgres.url, autocommit=True) as connection:
        db = Database(own_postgres.url, connection)
        await db.insert_tasks(QUEUE, {job.task_id: {} for job in (first, second)})
    async with running([task], **urls):
        await node5.schedule_all(QUEUE, [first])
        await raised.wait()
        await node5.schedule_all(QUEUE, [second])
        await asyncio.sleep(AWAY)
        back_at = time.time() * 1000
        own_postgres.resume()

        async def both_completed() -> bool:
            return await redis.zcard(f"{prefix}:{QUEUE}:completed") == 2

        await until(both_completed, 40)
        claimed_at = [
            int(await redis.hget(f"{prefix}:{QUEUE}:{job.task_id}", "processedOn") or 0)
            for job in (first, second)
        ]
    # The first one's backoff was over before PostgreSQL came back, so it was due at once.
    assert min(claimed_at) >= back_at
    async with await Connection.connect(own_postgres.url, autocommit=True) as connection:
        assert set(await Database(own_postgres.url, connection).statuses()) == {"completed"}
