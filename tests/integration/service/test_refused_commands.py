"""Redis refuses commands for reasons of its own: no job pays for it, and none is lost."""

import asyncio
import os
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.agreement import bull_jobs, differences
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import running
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "q"
JOBS = int(os.environ.get("REFUSED_JOBS", "400"))
LOSS = float(os.environ.get("REFUSED_SECONDS", "0.6"))
"""Seconds for which the right is lost."""

KEPT = {"removeOnComplete": 100_000, "removeOnFail": 100_000}
OPTIONS: Any = {"lockDuration": 5_000, "stalledInterval": 1_000}


@pytest.fixture
async def admin(own_redis: OwnServer) -> AsyncIterator[Redis]:
    async with Redis.from_url(own_redis.url, decode_responses=True) as client:
        await set_rights(client, "on", ">secret", "~*", "&*", "+@all")
        yield client


async def set_rights(admin: Any, *rights: str) -> None:
    await admin.execute_command("ACL", "SETUSER", "worker", *rights)


async def finished(admin: Redis, prefix: str) -> int:
    base = f"{prefix}:{QUEUE}:"
    return sum([await admin.zcard(base + state) for state in ("completed", "failed")])


async def check_all_completed(admin: Redis, prefix: str, db: Database, jobs: int) -> None:
    """Every job completed, and both stores tell the same of each."""
    rows = await db.rows()
    held = await bull_jobs(admin, prefix, QUEUE)
    assert differences(rows, held) == []
    assert Counter(row["status"] for row in rows.values()) == {"completed": jobs}


@pytest.mark.parametrize("command", ["zadd", "lrem", "lpush", "xadd", "hmset", "evalsha", "set"])
async def test_a_right_that_is_lost_for_a_while(
    command: str, own_redis: OwnServer, admin: Redis, prefix: str, db: Database
) -> None:
    """A tenth of the jobs fail once and come back by way of a delay."""

    async def handler(payload: dict[str, Any], ctx: TaskContext) -> int:
        if payload["fails"] and ctx.attempt == 1:
            raise ValueError("once")
        return ctx.attempt

    jobs = [
        Scheduled({"fails": n % 10 == 0}, backoff=50, attempts=3, opts=KEPT) for n in range(JOBS)
    ]
    await db.insert_tasks(QUEUE, {job.task_id: dict(job.payload) for job in jobs})
    async with Node(5, own_redis.url, prefix) as node:
        await node.schedule_all(QUEUE, jobs)
    task = define_task(QUEUE, handler, TaskOptions(concurrency=20), worker_options=OPTIONS)
    url = own_redis.url.replace("redis://", "redis://worker:secret@")
    async with running([task], redis_url=url, database_url=db.url, prefix=prefix):
        await until(lambda: finished(admin, prefix))
        for change in ("-", "+"):
            await set_rights(admin, change + command)
            # Long enough for every slot to meet the refusal, over and over.
            await asyncio.sleep(LOSS if change == "-" else 0)

        async def all_finished() -> bool:
            return await finished(admin, prefix) == JOBS

        await until(all_finished, 50)
        await check_all_completed(admin, prefix, db, JOBS)
