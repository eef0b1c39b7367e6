"""Jobs that go back to their queue by the handler's own word, and locks that a handler changes."""

import asyncio
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import (
    DelayedError,
    RateLimitError,
    TaskContext,
    TaskOptions,
    WaitingError,
    define_task,
)
from autoflow_worker.clock import now_ms
from tests.support.api import Api, Json
from tests.support.handlers import Gate
from tests.support.node import Node
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"


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


@pytest.mark.parametrize("limit_ms", [None, 0, 300])
async def test_a_job_goes_back_and_keeps_its_attempt(
    run_worker: RunWorker, api: Api, limit_ms: int | None
) -> None:
    handler = GoesBack(limit_ms)
    async with run_worker([define_task(QUEUE, handler, TaskOptions(concurrency=2))]):
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


async def test_a_handler_that_goes_on_after_its_move_is_believed(
    run_worker: RunWorker, api: Api
) -> None:
    """The lock went with the move, so it is no sign of another worker, however late it is."""
    gate = Gate(DelayedError())
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([define_task(QUEUE, gate)]):
        await until(lambda: gate.contexts)
        job: Any = gate.contexts[0].job
        await job.moveToDelayed(now_ms() + 600_000, job.token)
        job.lock.locked_until = 0.0  # as if a lock's duration had passed
        gate.opened.set()
        row = await api.until_both_say(QUEUE, task_id, "delayed")
    assert (row["error"], row["attempts"]) == (None, 1)


@pytest.mark.parametrize("priority", [0, 3])
async def test_a_job_that_went_back_wakes_an_idle_worker(
    run_worker: RunWorker, node5: Node, redis: Redis, prefix: str, priority: int
) -> None:
    """BullMQ puts no marker for a job with a priority, as those of the API are."""
    gate, marker = Gate(WaitingError()), f"{prefix}:{QUEUE}:marker"
    async with run_worker([define_task(QUEUE, gate, TaskOptions(concurrency=1))]):
        await node5.add(QUEUE, {}, priority=priority)
        await until(lambda: gate.contexts)
        await redis.delete(marker)
        job = gate.contexts[0].job
        assert await job.moveToWait(job.token) == 0
        assert await redis.zscore(marker, "0") == 0
        gate.opened.set()
        await until(lambda: len(gate.contexts) == 2)


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
