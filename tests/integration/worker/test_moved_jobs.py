"""Jobs that go back to their queue by the handler's own word, and locks that a handler changes."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import RateLimitError, TaskContext, TaskOptions, WaitingError, define_task
from tests.support.api import Api, Json
from tests.support.handlers import Gate
from tests.support.node import Node
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"

# Without a marker an idle slot would not look for jobs while a test lasts.
RARELY: Any = {"drainDelay": 60}
TWO = TaskOptions(concurrency=2)


class GoesBack:
    """A handler whose first run gives the job back; `runs` are the times of its runs."""

    def __init__(self, limit_ms: int | None = None) -> None:
        self.limit_ms = limit_ms
        self.runs: list[float] = []
        self.go_on = asyncio.Event()

    async def __call__(self, payload: Json, ctx: TaskContext) -> str:
        self.runs.append(asyncio.get_running_loop().time())
        if len(self.runs) > 1:
            return f"run {len(self.runs)}"
        await self.go_on.wait()
        if self.limit_ms is None:
            assert await ctx.job.moveToWait(ctx.job.token) == 0
            raise WaitingError
        if self.limit_ms:
            await ctx.job.rateLimit(self.limit_ms)
        raise RateLimitError


async def until_it_waits(redis: Redis) -> None:
    """Wait until a worker's slot blocks for jobs."""

    async def blocks() -> bool:
        return any("b" in client["flags"] for client in await redis.client_list())

    await until(blocks)


@pytest.mark.parametrize("limit_ms", [None, 0, 300])
async def test_a_job_goes_back_and_keeps_its_attempt(
    run_worker: RunWorker, api: Api, limit_ms: int | None
) -> None:
    """Both stores say so while it waits; nothing else has to happen for it to run again."""
    handler = GoesBack(limit_ms)
    task = define_task(QUEUE, handler, TWO, worker_options=RARELY)
    async with run_worker([task]):
        task_id = await api.schedule(QUEUE, attempts=1)
        await until(lambda: handler.runs)
        await api.node.pause(QUEUE)
        handler.go_on.set()
        row = await api.until_both_say(QUEUE, task_id, "pending")
        assert (row["error"], row["failedAt"], row["attempts"]) == (None, None, 1)
        await api.node.resume(QUEUE)
        row = await api.until_both_say(QUEUE, task_id, "completed")
        job = await api.node.get_job(QUEUE, task_id)
    assert (row["attempts"], row["result"]["output"]) == (1, "run 2")
    assert job is not None
    assert (job["attemptsMade"], job["attemptsStarted"]) == (1, 2)


@pytest.mark.parametrize("priority", [0, 3])
async def test_a_job_that_went_back_wakes_an_idle_slot(
    run_worker: RunWorker, node: Node, redis: Redis, priority: int
) -> None:
    """BullMQ puts no marker for a job with a priority, as those of the API are."""
    handler = GoesBack()
    async with run_worker([define_task(QUEUE, handler, TWO, worker_options=RARELY)]):
        job_id = await node.add(QUEUE, {}, priority=priority)
        await until(lambda: handler.runs)
        await until_it_waits(redis)
        handler.go_on.set()

        async def completed() -> bool:
            return await node.get_state(QUEUE, job_id) == "completed"

        await until(completed)


@pytest.mark.parametrize("limiter", [None, {"max": 1000, "duration": 1000}])
async def test_the_queue_rests_until_the_limit_ends(
    run_worker: RunWorker, node: Node, limiter: Json | None
) -> None:
    handler = GoesBack(limit_ms=700)
    options: Any = {"limiter": limiter} if limiter else {}
    task = define_task(QUEUE, handler, TaskOptions(concurrency=1), worker_options=options)
    async with run_worker([task]):
        first = await node.add(QUEUE, {}, priority=3)
        await until(lambda: handler.runs)
        second = await node.add(QUEUE, {}, priority=3)
        handler.go_on.set()
        await until(lambda: len(handler.runs) == 3)
        assert handler.runs[1] - handler.runs[0] > 0.6

        async def both_completed() -> bool:
            states = [await node.get_state(QUEUE, job_id) for job_id in (first, second)]
            return states == ["completed", "completed"]

        await until(both_completed)
        # The one that went back was the first again.
        ends = [await node.get_job(QUEUE, job_id) for job_id in (first, second)]
    outputs = [job["returnvalue"]["output"] for job in ends if job is not None]
    assert outputs == ["run 2", "run 3"]


async def test_a_lock_that_the_handler_makes_longer(
    run_worker: RunWorker, node: Node, redis: Redis, prefix: str
) -> None:
    gate = Gate("done")
    job_id = await node.add(QUEUE, {})
    async with run_worker([define_task(QUEUE, gate)]):
        await until(lambda: gate.contexts)
        job = gate.contexts[0].job
        assert await job.extendLock("another-token", 600_000) == 0
        assert await redis.pttl(f"{prefix}:{QUEUE}:{job_id}:lock") <= 30_000
        assert await job.extendLock(job.token, 600_000) == 1
        assert await redis.pttl(f"{prefix}:{QUEUE}:{job_id}:lock") > 500_000
        gate.opened.set()

        async def completed() -> bool:
            return await node.get_state(QUEUE, job_id) == "completed"

        await until(completed)


async def test_a_lock_that_the_handler_makes_too_short(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """Who took the job over meanwhile has it; this attempt writes nothing into the row."""
    gate = Gate("too late")
    task_id = await api.schedule(QUEUE)
    lock = f"{prefix}:{QUEUE}:{task_id}:lock"
    async with run_worker([define_task(QUEUE, gate, TaskOptions(concurrency=1))]):
        await until(lambda: gate.contexts)
        job = gate.contexts[0].job
        assert await job.extendLock(job.token, 1) == 1

        async def expired() -> bool:
            return not await redis.exists(lock)

        await until(expired)
        await redis.set(lock, "another-worker")
        gate.opened.set()
        next_id = await api.schedule(QUEUE)
        await api.until_both_say(QUEUE, next_id, "completed")
        row = await api.db.row(task_id)
        assert row is not None
        assert (row["status"], row.get("result")) == ("active", None)
        assert await redis.get(lock) == "another-worker"
