"""`RetryLater` and `RateLimited`: the job comes back, and no attempt is used up."""

import asyncio
import base64
from collections.abc import Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import (
    RateLimited,
    RetryLater,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    define_task,
)
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"

Json = dict[str, Any]


def both_kinds(body: Callable[[TaskContext], object]) -> list[TaskDefinition[Any]]:
    async def in_loop(payload: Json, ctx: TaskContext) -> object:
        return body(ctx)

    def in_thread(payload: Json, ctx: TaskContext) -> object:
        return body(ctx)

    return [define_task("loop", in_loop), define_task("thread", in_thread)]


async def schedule(node: Node, db: Database, queue: str, **facts: Any) -> str:
    job = Scheduled(**facts)
    await db.insert_tasks(queue, {job.task_id: {}})
    await node.schedule_all(queue, [job])
    return job.task_id


async def test_the_row_is_delayed_and_the_attempt_is_not_used_up(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    attempts: list[int] = []

    def body(ctx: TaskContext) -> str:
        attempts.append(ctx.attempt)
        if len(attempts) == 1:
            raise RetryLater(3600)
        if len(attempts) == 2:
            raise RetryLater(0)
        return "done"

    for task in both_kinds(body):
        attempts.clear()
        queue = task.queue_name
        async with run_worker([task]):
            task_id = await schedule(node5, db, queue, attempts=1)
            row = await db.until_status(task_id, "delayed")
            assert row.delayUntil is not None
            await until(lambda: _is_delayed(node5, queue, task_id))  # noqa: B023
            await node5.job(queue, task_id, "promote")
            row = await db.until_status(task_id, "completed")
        assert attempts == [1, 1, 1]
        assert row.attempts == 1
        assert row.delayUntil is None


async def _is_delayed(node: Node, queue: str, task_id: str) -> bool:
    return await node.get_state(queue, task_id) == "delayed"


async def test_a_cancelled_task_does_not_come_back(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def handler(payload: Json, ctx: TaskContext) -> None:
        begun.set()
        await go_on.wait()
        raise RetryLater(1)

    async with run_worker([define_task(QUEUE, handler)]):
        task_id = await schedule(node5, db, QUEUE)
        await begun.wait()
        await db.execute(
            """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s""", task_id
        )
        go_on.set()

        async def has_failed() -> bool:
            return await node5.get_state(QUEUE, task_id) == "failed"

        await until(has_failed)
    assert await db.status(task_id) == "cancelled"


async def test_the_whole_queue_rests(
    node5: Node, db: Database, redis: Redis, prefix: str, run_worker: RunWorker
) -> None:
    begun: list[str] = []

    async def handler(payload: Json, ctx: TaskContext) -> None:
        begun.append(ctx.task_id)
        if len(begun) == 1:
            raise RateLimited(3600)

    task = define_task(
        QUEUE,
        handler,
        worker_options={
            "limiter": {"max": 100, "duration": 1000},
            "maximumRateLimitDelay": 50,
        },
    )
    async with run_worker([task]):
        first = await schedule(node5, db, QUEUE, attempts=1)
        await until(lambda: bool(begun))
        await db.until_status(first, "pending")
        second = await schedule(node5, db, QUEUE, attempts=1)
        assert await redis.pttl(f"{prefix}:{QUEUE}:limiter") > 3_000_000
        assert begun == [first]
        await node5.queue(QUEUE, "removeRateLimitKey")
        assert (await db.until_status(first, "completed")).attempts == 1
        await db.until_status(second, "completed")
    assert begun == [first, first, second]


async def test_the_other_slots_rest_too(
    node5: Node, db: Database, redis: Redis, prefix: str, run_worker: RunWorker
) -> None:
    """Without a limiter among its options, BullMQ tells no worker of the limit."""
    begun: list[str] = []
    go_on = asyncio.Event()

    async def handler(payload: Json, ctx: TaskContext) -> None:
        begun.append(ctx.task_id)
        if len(begun) == 1:
            await go_on.wait()
            raise RateLimited(3600)
        await asyncio.Event().wait()

    options = TaskOptions(concurrency=2)
    blocking = f"{prefix}:{base64.b64encode(QUEUE.encode()).decode()}"

    async def waits_for_a_marker() -> bool:
        clients = await redis.client_list()
        return any(client["name"] == blocking and "b" in client["flags"] for client in clients)

    async def is_put_back() -> bool:
        return bool(await redis.zcard(f"{prefix}:{QUEUE}:prioritized"))

    async def waits_for_none() -> bool:
        return not await waits_for_a_marker()

    async with run_worker([define_task(QUEUE, handler, options)]) as worker:
        first = await schedule(node5, db, QUEUE)
        await until(lambda: begun == [first])
        await until(waits_for_a_marker)
        go_on.set()
        await db.until_status(first, "pending")
        await until(is_put_back)
        # The other slot is woken, and must not fetch.
        await until(waits_for_none)
        assert await worker.abort() == 0
    assert begun == [first]
    assert await db.status(first) == "pending"


@pytest.mark.parametrize("seconds", [-1, float("nan"), float("inf"), 10**9])
def test_seconds_that_make_no_sense(seconds: float) -> None:
    with pytest.raises(ValueError, match="seconds must be from 0"):
        RetryLater(seconds)
    with pytest.raises(ValueError, match="seconds must be from 0"):
        RateLimited(seconds)
