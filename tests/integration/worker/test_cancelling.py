"""Cancelling a task while its handler runs: the row says so, and the handler hears of it."""

import asyncio
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"
NO_LIMIT = TaskOptions(timeout_ms=None, concurrency=20)

Json = dict[str, Any]


class Told:
    """Handlers of each kind, and what they were told."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.heard: list[str] = []
        self.released = threading.Event()

    async def cancelled_task(self, payload: Json, ctx: TaskContext) -> None:
        self.begun.append(ctx.task_id)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            assert ctx.cancelled
            self.heard.append(ctx.task_id)
            raise

    async def waiting(self, payload: Json, ctx: TaskContext) -> None:
        self.begun.append(ctx.task_id)
        work = asyncio.create_task(asyncio.Event().wait())
        watch = asyncio.create_task(ctx.wait_cancelled())
        try:
            await asyncio.wait({work, watch}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if ctx.cancelled:
                self.heard.append(ctx.task_id)
            work.cancel()
            watch.cancel()

    def in_thread(self, payload: Json, ctx: TaskContext) -> None:
        self.begun.append(ctx.task_id)
        while not self.released.is_set():
            try:
                ctx.raise_if_cancelled()
            except Exception:
                self.heard.append(ctx.task_id)
                raise
            time.sleep(0.01)


async def cancel(db: Database, task_id: str) -> None:
    await db.execute(
        """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s""", task_id
    )


@pytest.mark.parametrize("kind", ["cancelled_task", "waiting", "in_thread"])
async def test_the_handler_hears_of_it_and_its_job_fails_for_good(
    node5: Node, db: Database, run_worker: RunWorker, kind: str
) -> None:
    told = Told()
    handler: Callable[..., Any] = getattr(told, kind)
    jobs = [Scheduled(attempts=5, backoff=1) for _ in range(20)]
    ids = [job.task_id for job in jobs]
    await db.insert_tasks(QUEUE, {task_id: {} for task_id in ids})
    try:
        async with run_worker([define_task(QUEUE, handler, NO_LIMIT)]) as worker:
            await node5.schedule_all(QUEUE, jobs)
            await until(lambda: len(told.begun) == 20)
            for task_id in ids[:10]:
                await cancel(db, task_id)
            await until(lambda: set(told.heard) == set(ids[:10]))
            for task_id in ids[:10]:
                await until(partial(_has_failed, node5, task_id))
                job = await node5.get_job(QUEUE, task_id)
                assert job is not None
                assert job["failedReason"] == "the task is cancelled"
            # The others run on.
            statuses = await db.statuses()
            assert statuses == {"cancelled": 10, "active": 10}
            told.released.set()
            await worker.abort()
    finally:
        told.released.set()
    assert len(told.begun) == 20
    assert {await db.status(task_id) for task_id in ids[:10]} == {"cancelled"}


async def _has_failed(node: Node, task_id: str) -> bool:
    return await node.get_state(QUEUE, task_id) == "failed"


async def test_a_handler_that_returns_all_the_same_completes_its_task(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    begun = asyncio.Event()

    def stubborn(payload: Json, ctx: TaskContext) -> str:
        loop.call_soon_threadsafe(begun.set)
        while not ctx.cancelled:
            time.sleep(0.01)
        return "finished"

    loop = asyncio.get_running_loop()
    job = Scheduled()
    await db.insert_tasks(QUEUE, {job.task_id: {}})
    async with run_worker([define_task(QUEUE, stubborn, NO_LIMIT)]):
        await node5.schedule_all(QUEUE, [job])
        await begun.wait()
        await cancel(db, job.task_id)
        row = await db.until_status(job.task_id, "completed")
        await until(lambda: _has_completed(node5, job.task_id))
    assert row.result is not None
    assert row.result.output == "finished"


async def _has_completed(node: Node, task_id: str) -> bool:
    return await node.get_state(QUEUE, task_id) == "completed"
