"""A quiet worker takes no job and loses no marker; what runs goes on. It wakes again, or stops.

`drainDelay` is a minute: no worker asks its queue for jobs unless a marker or `wake` tells it to.
"""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import pytest
from bullmq import Queue
from redis.asyncio import Redis

from autoflow_worker import TaskContext, define_task
from tests.support.database import Database
from tests.support.plain import blocked, producer, until_idle, until_renewed
from tests.support.running import RunWorker
from tests.support.until import until

DOZY: Any = {"drainDelay": 60, "stalledInterval": 600_000}


@pytest.fixture
async def queue(redis_url: str, prefix: str) -> AsyncIterator[Queue]:
    async with producer("naps", redis_url, prefix) as made:
        yield made


def connection(prefix: str) -> str:
    """What a worker's blocking connection is called."""
    return f"{prefix}:{base64.b64encode(b'naps').decode()}"


async def handler(payload: dict[str, Any], ctx: TaskContext) -> None: ...


async def test_a_quiet_worker_leaves_jobs_and_markers_to_others(
    run_worker: RunWorker, queue: Queue, redis: Redis, db: Database, prefix: str
) -> None:
    task = define_task("naps", handler, worker_options=DOZY)

    async def are_blocked(count: int) -> bool:
        return len(await blocked(redis, connection(prefix))) == count

    async with run_worker([task]) as one, run_worker([task]):
        for n in range(20):
            await until(lambda: are_blocked(2))
            job = await queue.add("naps", {}, {"jobId": f"job-{n}"})
            # It may have the job's marker by now.
            one.service.be_quiet()
            await db.until_status(job.id, "completed")
            await until(lambda: are_blocked(1))
            job = await queue.add("naps", {}, {"jobId": f"next-{n}"})
            await db.until_status(job.id, "completed")
            one.service.wake()


async def test_what_runs_goes_on_and_is_followed_by_nothing(
    run_worker: RunWorker, queue: Queue, redis: Redis, db: Database, prefix: str
) -> None:
    gate = asyncio.Event()

    async def waits(payload: dict[str, Any], ctx: TaskContext) -> None:
        await gate.wait()

    short: Any = {**DOZY, "lockDuration": 1000}
    task = define_task("naps", waits, worker_options=short)
    async with run_worker([task]) as worker:
        for job_id in ("first", "second"):
            await queue.add("naps", {}, {"jobId": job_id})
        await db.until_status("first", "active")
        worker.service.be_quiet()
        await until_renewed(redis, f"{prefix}:naps:first:lock")
        gate.set()
        await db.until_status("first", "completed")
        [task_worker] = worker.service.workers
        await until(lambda: not list(task_worker.running_jobs()))
        assert await redis.lrange(f"{prefix}:naps:wait", 0, -1) == ["second"]
        assert await blocked(redis, connection(prefix)) == []
        worker.service.wake()
        await db.until_status("second", "completed")
        await until_idle(redis, connection(prefix))
        worker.service.be_quiet()
        assert await worker.stop() == 0
