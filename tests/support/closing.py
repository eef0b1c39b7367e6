"""Handlers that end at their cancellation or not, and what a stop may leave behind."""

import asyncio
from typing import Any

from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from tests.support.running import Running
from tests.support.until import until

QUEUE = "closing"
GRACE = 0.5
LIMIT = GRACE + 2


# What a busy machine may add to the limit.
SLACK = 10


class Handler:
    """Counts its runs, and works until it is released, or not at all."""

    def __init__(self, *, released: bool = False) -> None:
        self.runs: list[tuple[str, int]] = []
        self.cancelled = 0
        self.released = asyncio.Event()
        if released:
            self.released.set()

    async def __call__(self, payload: dict[str, object], ctx: TaskContext) -> str:
        self.runs.append((ctx.task_id, ctx.attempt))
        await self.work()
        return "done"

    async def work(self) -> None:
        await self.released.wait()


class Stubborn(Handler):
    """Swallows every cancellation."""

    async def work(self) -> None:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1


class LastMinute(Handler):
    """Is done in the moment of its cancellation."""

    async def work(self) -> None:
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1


def a_task(handler: Any, concurrency: int = 2) -> TaskDefinition[Any]:
    return define_task(
        QUEUE,
        handler,
        TaskOptions(concurrency=concurrency),
        # Short, for the cases in which a job can only be found by the stalled check.
        worker_options={"lockDuration": 2000, "stalledInterval": 500, "maxStalledCount": 5},
    )


async def bounded_stop(worker: Running) -> int:
    """Stop it; it may not take longer than is promised."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    code = await worker.stop()
    assert loop.time() - began < LIMIT + SLACK
    return code


class Queue:
    """What Redis holds of the queue."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.redis = redis
        self.base = f"{prefix}:{QUEUE}:"

    async def assert_nothing_is_stranded(self) -> None:
        assert await self.redis.lrange(self.base + "active", 0, -1) == []
        assert await self.redis.smembers(self.base + "stalled") == set()
        assert [key async for key in self.redis.scan_iter(self.base + "*:lock")] == []

    async def assert_nothing_is_used_up(self, job_id: str, attempts: int | None = None) -> None:
        """Neither attempts nor stalls were counted, but for the attempts that are given."""
        stalls, made = await self.redis.hmget(self.base + job_id, "stc", "atm")
        assert (stalls, made) == (None, None if attempts is None else str(attempts))

    async def until_active(self, count: int = 1) -> None:
        async def active() -> bool:
            return int(await self.redis.llen(self.base + "active")) == count

        await until(active)


async def until_idle(worker: Running) -> None:
    [task_worker] = worker.service.workers
    await until(lambda: task_worker.is_idle)
