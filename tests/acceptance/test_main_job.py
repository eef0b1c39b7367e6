"""The main job: a thousand jobs from the API, and what both stores tell about each at the end."""

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.row import TaskRow
from tests.support.until import until

QUEUE = "users-send-welcome-email"
JOBS = 1000

TASKS = f"""
    import asyncio
    from autoflow_worker import TaskOptions, UnrecoverableError, define_task

    async def handler(payload, ctx):
        n = payload["n"]
        await asyncio.sleep(payload["seconds"])
        if n % 100 == 1:
            raise UnrecoverableError(f"{{n}} is wrong")
        if n % 100 == 51 or n % 10 == 0 and ctx.attempt < 3:
            raise ValueError(f"{{n}} failed on attempt {{ctx.attempt}}")
        return {{"n": n, "attempt": ctx.attempt}}

    tasks = [define_task("{QUEUE}", handler, TaskOptions(concurrency=50))]
"""


def expected(n: int) -> tuple[str, int, Any, str | None]:
    """Status, attempts, output and reason that job `n` has to end with."""
    if n % 100 == 1:
        return "failed", 1, None, f"{n} is wrong"
    if n % 100 == 51:
        return "failed", 3, None, f"{n} failed on attempt 3"
    attempts = 3 if n % 10 == 0 else 1
    return "completed", attempts, {"n": n, "attempt": attempts}, None


def told(row: TaskRow) -> tuple[str, int, Any, str | None]:
    """The same of a row."""
    output = None if row.result is None else row.result.output
    return row.status, row.attempts, output, None if row.error is None else row.error.reason


async def schedule(db: Database, node: Node, *, seconds: float, **options: Any) -> list[str]:
    """Schedule the jobs as the API does; their ids, in their order."""
    jobs = [
        Scheduled({"n": n, "seconds": seconds}, attempts=3, backoff=10, **options)
        for n in range(JOBS)
    ]
    await db.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
    return await node.schedule_all(QUEUE, jobs)


async def finished(worker: WorkerProcess, db: Database) -> None:
    """Wait until every row is terminal."""

    async def all_terminal() -> bool:
        assert worker.running, worker.report()
        statuses = await db.statuses()
        return statuses["completed"] + statuses["failed"] == JOBS

    await until(all_terminal, 120, message="all rows to be terminal")


async def check_rows(db: Database, ids: list[str]) -> Mapping[str, TaskRow]:
    rows = {row_id: TaskRow.model_validate(data) for row_id, data in (await db.rows()).items()}
    assert {row_id: told(rows[row_id]) for row_id in ids} == {
        row_id: expected(n) for n, row_id in enumerate(ids)
    }
    for row in rows.values():
        if row.status == "completed":
            assert row.startedAt
            assert row.completedAt
            assert row.completedAt >= row.startedAt
            assert (row.failedAt, row.delayUntil) == (None, None)
        else:
            assert row.failedAt
            assert (row.completedAt, row.result) == (None, None)
    return rows


async def until_counts(node: Node, **counts: int) -> None:
    """Wait until BullMQ counts as many jobs: acknowledgements follow the rows."""

    async def equal() -> bool:
        found = await node.get_counts(QUEUE)
        return {state: count for state, count in found.items() if count} == counts

    await until(equal, message=f"{counts} in BullMQ")


@pytest.mark.slow
async def test_a_thousand_jobs(worker_process: WorkerStarter, node5: Node, db: Database) -> None:
    keep = {"removeOnComplete": False, "removeOnFail": False}
    ids = await schedule(db, node5, seconds=0.001, opts=keep)
    worker = worker_process(TASKS)
    await finished(worker, db)
    rows = await check_rows(db, ids)
    await until_counts(node5, completed=980, failed=20)
    jobs = await node5.queue(QUEUE, "getJobs", ["completed", "failed"], 0, -1)
    assert {job["id"] for job in jobs} == set(ids)
    for job in jobs:
        row = rows[job["id"]]
        assert job["attemptsMade"] == row.attempts
        if row.status == "completed":
            assert row.result is not None
            assert job["returnvalue"] == row.result.model_dump()
        else:
            assert row.error is not None
            assert job["failedReason"] == row.error.reason
    worker.terminate()
    assert await worker.wait() == 0, worker.report()
    assert worker.stderr == ""


@pytest.mark.slow
async def test_a_sigterm_in_the_middle(
    worker_process: WorkerStarter, node5: Node, db: Database
) -> None:
    ids = await schedule(db, node5, seconds=0.1)
    first = worker_process(TASKS, WORKER_SHUTDOWN_GRACE="20")

    async def in_the_middle() -> bool:
        return (await db.statuses())["completed"] >= JOBS // 4

    await until(in_the_middle)
    assert (await db.statuses())["active"] > 0
    first.terminate()
    assert await first.wait(20) == 0, first.report()

    statuses = await db.statuses()
    assert statuses["active"] == 0
    assert statuses["completed"] < JOBS
    assert (await node5.get_counts(QUEUE))["active"] == 0

    second = worker_process()
    await finished(second, db)
    await check_rows(db, ids)
    # What the API asks BullMQ to keep.
    await until_counts(node5, completed=100, failed=20)
    second.terminate()
    assert await second.wait() == 0, second.report()
