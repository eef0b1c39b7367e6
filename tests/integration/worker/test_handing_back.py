"""Handing back many jobs at once: few round trips, whatever the link's latency."""

import asyncio
from typing import Any

from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.agreement import bull_jobs
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.proxy import Proxy
from tests.support.running import running
from tests.support.until import until

QUEUE = "q"
SLOTS = 200


async def test_all_jobs_go_back_in_few_round_trips(
    node5: Node, redis: Redis, redis_url: str, db: Database, prefix: str
) -> None:
    begun: list[str] = []

    async def handler(payload: dict[str, Any], ctx: TaskContext) -> None:
        begun.append(ctx.task_id)
        await asyncio.Event().wait()

    jobs = [Scheduled() for _ in range(SLOTS)]
    await db.insert_tasks(QUEUE, {job.task_id: {} for job in jobs})
    await node5.schedule_all(QUEUE, jobs)
    task = define_task(QUEUE, handler, TaskOptions(concurrency=SLOTS, timeout_ms=None))
    async with Proxy(redis_url) as proxy:
        urls = {"redis_url": proxy.url, "database_url": db.url, "prefix": prefix}
        async with running([task], **urls) as worker:
            await until(lambda: len(begun) == SLOTS)
            before = len(proxy.chunks)
            assert await worker.abort() == 4
        # One by one, there would be a piece for each job at least.
        assert len(proxy.chunks) - before < SLOTS / 2
    held = await bull_jobs(redis, prefix, QUEUE)
    assert {job.states[0] for job in held.values()} <= {"delayed", "prioritized"}
    assert len(held) == SLOTS
    assert not any(job.locked for job in held.values())
    assert (await db.statuses()) == {"pending": SLOTS}
