"""Closing: at whatever instant the stop comes, every job is run or handed back, in bounded time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from autoflow_worker import TaskContext
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.service import EXIT_CLEAN, EXIT_HANDED_BACK, WorkerService
from autoflow_worker.settings import Settings
from autoflow_worker.worker.history import JobHistory
from autoflow_worker.worker.task_worker import DRAIN_DELAY, TaskWorker
from tests.support.api import Api
from tests.support.closing import (
    GRACE,
    QUEUE,
    Handler,
    LastMinute,
    Queue,
    Stubborn,
    a_task,
    bounded_stop,
    until_idle,
)
from tests.support.database import Database
from tests.support.running import RunWorker
from tests.support.until import until

Patch = Callable[..., Awaitable[Any]]


def before(stop: asyncio.Event, original: Patch) -> Patch:
    async def patched(*args: Any, **kwargs: Any) -> Any:
        stop.set()
        return await original(*args, **kwargs)

    return patched


def during(stop: asyncio.Event, original: Patch) -> Patch:
    async def patched(*args: Any, **kwargs: Any) -> Any:
        reply = asyncio.ensure_future(original(*args, **kwargs))
        while not reply.done() and not stop.is_set():
            # It has been sent in the second turn of the loop, and can't have been answered before.
            for _ in range(2):
                await asyncio.sleep(0)
            stop.set()
        return await reply

    return patched


def after(stop: asyncio.Event, original: Patch) -> Patch:
    async def patched(*args: Any, **kwargs: Any) -> Any:
        reply = await original(*args, **kwargs)
        stop.set()
        return reply

    return patched


@pytest.mark.parametrize("instant", [before, during, after])
@pytest.mark.parametrize(
    ("part", "method"),
    [
        (JobQueue, "open"),
        (JobQueue, "fetch"),
        (TaskWorker, "_attempt"),
        (JobHistory, "start"),
        (JobHistory, "finish"),
        (JobQueue, "complete"),
    ],
    ids=["connecting", "fetch", "attempt", "start", "outcome", "acknowledgement"],
)
async def test_a_stop_at_any_instant_strands_no_job(
    *,
    api: Api,
    redis_url: str,
    database_url: str,
    prefix: str,
    queue: Queue,
    run_worker: RunWorker,
    monkeypatch: pytest.MonkeyPatch,
    part: type,
    method: str,
    instant: Callable[..., Patch],
) -> None:
    ids = [await api.schedule(QUEUE) for _ in range(5)]
    handler = Handler(released=True)
    stop = asyncio.Event()
    service = WorkerService(
        Settings(redis_url=redis_url, database_url=database_url, bullmq_prefix=prefix),
        [a_task(handler)],
    )
    with monkeypatch.context() as patch:
        patch.setattr(part, method, instant(stop, getattr(part, method)))
        async with asyncio.timeout(60):
            assert await service.run(stop, asyncio.Event()) == EXIT_CLEAN
    await queue.assert_nothing_is_stranded()
    async with run_worker([a_task(handler)]):
        for job_id in ids:
            row = await api.until_both_say(QUEUE, job_id, "completed")
            assert row["attempts"] == 1
            await queue.assert_nothing_is_used_up(job_id, attempts=1)
    assert sorted(handler.runs) == sorted((job_id, 1) for job_id in ids)


async def test_a_stop_while_blocked_strands_no_job_that_comes_just_then(
    api: Api, queue: Queue, run_worker: RunWorker
) -> None:
    handler = Handler(released=True)
    ids = []
    for turn in range(8):
        async with run_worker([a_task(handler)]) as worker:
            await until_idle(worker)
            adding = asyncio.create_task(api.schedule(QUEUE))
            for _ in range(turn * 3):
                await asyncio.sleep(0)
            assert await bounded_stop(worker) == EXIT_CLEAN
            await queue.assert_nothing_is_stranded()
            ids.append(await adding)
    async with run_worker([a_task(handler)]):
        for job_id in ids:
            await api.until_both_say(QUEUE, job_id, "completed")
            await queue.assert_nothing_is_used_up(job_id, attempts=1)
    assert sorted(handler.runs) == sorted((job_id, 1) for job_id in ids)


async def test_handed_back_jobs_start_at_once_elsewhere_and_use_nothing_up(
    api: Api, queue: Queue, run_worker: RunWorker
) -> None:
    first, second = Handler(), Handler(released=True)
    async with run_worker([a_task(first)], worker_shutdown_grace=GRACE) as worker:
        ids = [await api.schedule(QUEUE, priority="critical") for _ in range(2)]
        await until(lambda: len(first.runs) == 2)
        async with run_worker([a_task(second)]) as other:
            await until_idle(other)
            assert await bounded_stop(worker) == EXIT_HANDED_BACK
            # A lost marker would be noticed after `drainDelay` only.
            await until(lambda: len(second.runs) == 2, DRAIN_DELAY / 2)
            for job_id in ids:
                row = await api.until_both_say(QUEUE, job_id, "completed")
                assert row["attempts"] == 1
                await queue.assert_nothing_is_used_up(job_id, attempts=1)
    assert sorted(first.runs) == sorted(second.runs) == sorted((job_id, 1) for job_id in ids)


async def test_a_handed_back_jobs_row_is_pending(
    api: Api, db: Database, queue: Queue, run_worker: RunWorker
) -> None:
    handler = Handler()
    async with run_worker([a_task(handler)], worker_shutdown_grace=GRACE) as worker:
        job_id = await api.schedule(QUEUE)
        await db.until_status(job_id, "active")
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
    assert await db.status(job_id) == "pending"
    await queue.assert_nothing_is_stranded()
    await queue.assert_nothing_is_used_up(job_id)


async def test_a_second_signal_hands_back_long_before_the_deadline(
    api: Api, db: Database, queue: Queue, run_worker: RunWorker
) -> None:
    handler = Handler()
    async with run_worker([a_task(handler)], worker_shutdown_grace=3600.0) as worker:
        job_id = await api.schedule(QUEUE)
        await db.until_status(job_id, "active")
        worker.stopping.set()
        await until(lambda: all(part.is_stopping for part in worker.service.workers))
        worker.aborting.set()
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
    await queue.assert_nothing_is_stranded()
    await queue.assert_nothing_is_used_up(job_id)


async def test_a_handler_that_swallows_cancellation_is_left_behind(
    api: Api, queue: Queue, run_worker: RunWorker
) -> None:
    stubborn, other = Stubborn(), Handler(released=True)
    async with run_worker([a_task(stubborn)], worker_shutdown_grace=GRACE) as worker:
        job_id = await api.schedule(QUEUE)
        await until(lambda: stubborn.runs)
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
        assert stubborn.cancelled
    await queue.assert_nothing_is_stranded()
    async with run_worker([a_task(other)]):
        await api.until_both_say(QUEUE, job_id, "completed")
    await queue.assert_nothing_is_used_up(job_id, attempts=1)
    stubborn.released.set()


async def test_a_handler_that_is_done_at_its_cancellation_is_done(
    api: Api, queue: Queue, run_worker: RunWorker
) -> None:
    handler = LastMinute()
    async with run_worker([a_task(handler)], worker_shutdown_grace=GRACE) as worker:
        job_id = await api.schedule(QUEUE)
        await until(lambda: handler.runs)
        assert await bounded_stop(worker) == EXIT_CLEAN
    assert handler.cancelled == 1
    row = await api.until_both_say(QUEUE, job_id, "completed")
    assert row["result"]["output"] == "done"


async def test_a_sync_handler_is_left_behind(api: Api, queue: Queue, run_worker: RunWorker) -> None:
    released, runs = threading.Event(), []

    def handler(payload: dict[str, object], ctx: TaskContext) -> None:
        runs.append(ctx.attempt)
        released.wait(30)

    async with run_worker([a_task(handler)], worker_shutdown_grace=GRACE) as worker:
        job_id = await api.schedule(QUEUE)
        await until(lambda: runs)
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
    await queue.assert_nothing_is_stranded()
    await queue.assert_nothing_is_used_up(job_id)
    released.set()
    async with run_worker([a_task(handler)]):
        await api.until_both_say(QUEUE, job_id, "completed")
    assert runs == [1, 1]
