"""Queues that may not give a job: paused, at their global concurrency, or rate limited.

As in `test_idle_and_wake`, `drainDelay` is a minute as a rule.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from tests.support.database import Database
from tests.support.node import Node
from tests.support.plain import until_idle
from tests.support.running import RunWorker
from tests.support.until import PATIENCE, until

Payload = dict[str, Any]
DOZY: Any = {"drainDelay": 60, "stalledInterval": 600_000}
HOUR_MS = 3_600_000


@pytest.fixture
def name(prefix: str) -> str:
    """What the worker's connection is called."""
    return f"{prefix}:{base64.b64encode(b'naps').decode()}"


async def returns_at_once(payload: Payload, ctx: TaskContext) -> None:
    pass


def dozy_task(
    concurrency: int = 1,
    handler: Callable[[Payload, TaskContext], Awaitable[None]] = returns_at_once,
    **options: Any,
) -> TaskDefinition[Payload]:
    worker_options: Any = {**DOZY, **options}
    concurrent = TaskOptions(concurrency=concurrency)
    return define_task("naps", handler, options=concurrent, worker_options=worker_options)


async def is_promoted(node: Node, job_id: str) -> bool:
    return await node.get_state("naps", job_id) != "delayed"


async def schedule(db: Database, node: Node, delay: int | None = None) -> str:
    return await node.schedule("naps", task_id=await db.insert_task("naps"), delay=delay)


# -- paused and full queues ------------------------------------------------------------------------


async def test_a_paused_queue_wakes_when_it_is_resumed(
    run_worker: RunWorker, redis: Redis, db: Database, name: str, node: Node
) -> None:
    async with run_worker([dozy_task()]):
        await node.pause("naps")
        task_id = await schedule(db, node)
        await until_idle(redis, name)
        assert await db.status(task_id) == "pending"
        delayed = await schedule(db, node, 300)
        await until(lambda: is_promoted(node, delayed))
        assert await node.get_state("naps", delayed) == "prioritized"
        await node.resume("naps")
        for job in (task_id, delayed):
            await db.until_status(job, "completed")


async def test_a_queue_at_its_global_concurrency(
    run_worker: RunWorker, redis: Redis, db: Database, name: str, node: Node
) -> None:
    gate = asyncio.Event()

    async def waits(payload: Payload, ctx: TaskContext) -> None:
        await gate.wait()

    await node.queue("naps", "setGlobalConcurrency", 1)
    async with run_worker([dozy_task(2, waits)]):
        first = await schedule(db, node)
        await db.until_status(first, "active")
        await until_idle(redis, name)
        delayed = await schedule(db, node, 300)
        await until(lambda: is_promoted(node, delayed))
        assert await node.get_state("naps", delayed) == "prioritized"
        gate.set()
        await db.until_status(delayed, "completed")


async def test_what_puts_no_marker_is_noticed_within_the_drain_delay(
    run_worker: RunWorker, redis: Redis, db: Database, name: str, node: Node
) -> None:
    gate = asyncio.Event()

    async def waits(payload: Payload, ctx: TaskContext) -> None:
        await gate.wait()

    await node.queue("naps", "setGlobalConcurrency", 1)
    async with run_worker([dozy_task(2, waits, drainDelay=0.3)]):
        jobs = [await schedule(db, node) for _ in range(2)]
        await until_idle(redis, name)
        await node.queue("naps", "removeGlobalConcurrency")
        for job in jobs:
            await db.until_status(job, "active")
        gate.set()
        for job in jobs:
            await db.until_status(job, "completed")
        await node.pause("naps")
        await until_idle(redis, name)
        delayed = await schedule(db, node, 1000)
        # As if a worker had died that took it. Resuming puts one for waiting jobs only.
        await redis.delete(f"{name.partition(':')[0]}:naps:marker")
        await node.resume("naps")
        await db.until_status(delayed, "completed")


# -- rate limits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 5])
async def test_jobs_go_on_when_the_rate_limit_ends(
    run_worker: RunWorker, db: Database, node6: Node, concurrency: int
) -> None:
    task = dozy_task(concurrency, limiter={"max": 2, "duration": 300})
    jobs = [await schedule(db, node6) for _ in range(6)]
    async with run_worker([task]):
        for job in jobs:
            await db.until_status(job, "completed")


async def test_a_limit_that_node_sets_for_the_queue(
    run_worker: RunWorker, db: Database, node: Node
) -> None:
    await node.queue("naps", "setGlobalRateLimit", 1, 200)
    jobs = [await schedule(db, node) for _ in range(3)]
    async with run_worker([dozy_task(2)]):
        for job in jobs:
            await db.until_status(job, "completed")


async def test_a_limit_of_an_hour_that_node_removes(
    run_worker: RunWorker, db: Database, node: Node
) -> None:
    await node.queue("naps", "setGlobalRateLimit", 1, HOUR_MS)
    first = await schedule(db, node)
    async with run_worker([dozy_task(maximumRateLimitDelay=200)]):
        await db.until_status(first, "completed")
        later = await schedule(db, node)
        delayed = await schedule(db, node, 300)
        # Promoted inside the limit, as by Node's worker.
        await until(lambda: is_promoted(node, delayed))
        assert await node.get_state("naps", later) == "prioritized"
        await node.queue("naps", "removeGlobalRateLimit")
        for job in (later, delayed):
            await db.until_status(job, "completed")


async def test_a_rate_limit_key_that_node_removes(
    run_worker: RunWorker, db: Database, node: Node
) -> None:
    jobs = [await schedule(db, node) for _ in range(2)]
    task = dozy_task(limiter={"max": 1, "duration": HOUR_MS}, maximumRateLimitDelay=200)
    async with run_worker([task]):
        await db.until_status(jobs[0], "completed")
        await node.queue("naps", "removeRateLimitKey")
        await db.until_status(jobs[1], "completed")


async def test_stopping_does_not_wait_for_a_rate_limit(
    run_worker: RunWorker, db: Database, node6: Node
) -> None:
    task = dozy_task(limiter={"max": 1, "duration": 600_000})
    jobs = [await schedule(db, node6) for _ in range(2)]
    async with run_worker([task], worker_shutdown_grace=600) as worker:
        await db.until_status(jobs[0], "completed")
        async with asyncio.timeout(PATIENCE):
            assert await worker.stop() == 0
    assert await node6.get_state("naps", jobs[1]) == "prioritized"
