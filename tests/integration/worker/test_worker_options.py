"""Worker options with Node's effects: `name`, `maxStartedAttempts`, an async `backoffStrategy`."""

from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, define_task
from autoflow_worker.broker import official_worker
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import RunWorker

Payload = dict[str, Any]


async def test_node_sees_which_worker_processed_a_job(
    run_worker: RunWorker, db: Database, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        begun.append(ctx.task_id)
        if payload["fails"]:
            raise ValueError

    # The first worker of a process is compared with bullmq, and may have a name.
    monkeypatch.setattr(official_worker, "_known", set())
    task = define_task("named", handler, worker_options={"name": "mailer-1"})
    # The first is fetched; each other comes with the acknowledgement of one that completed, failed,
    # or is delayed for its next attempt.
    ids = [await db.insert_task("named", task_id=f"job-{n}") for n in range(4)]
    for task_id, fails, attempts in zip(ids, (0, 1, 1, 0), (1, 1, 2, 1), strict=True):
        options: Any = {"attempts": attempts, "backoff": {"type": "fixed", "delay": 200}}
        payload = {"fails": bool(fails)}
        await node.add("named", payload, jobId=task_id, removeOnFail=False, **options)
    async with run_worker([task]):
        for task_id, end in zip(ids, ("completed", "failed", "failed", "completed"), strict=True):
            await db.until_status(task_id, end)
    assert begun == [*ids, ids[2]]
    for task_id in ids:
        job = await node.get_job("named", task_id)
        assert job is not None
        assert job["processedBy"] == "mailer-1", task_id


async def test_a_job_that_was_started_too_often_fails(
    run_worker: RunWorker, redis: Redis, db: Database, node: Node, prefix: str
) -> None:
    begun: list[str] = []

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        begun.append(ctx.task_id)

    ids = [await db.insert_task("started", {}, task_id=f"job-{n}") for n in range(2)]
    for started, task_id in zip((1, 2), ids, strict=True):
        await node.add("started", {}, jobId=task_id, attempts=5)
        await redis.hset(f"{prefix}:started:{task_id}", "ats", str(started))
    task = define_task("started", handler, worker_options={"maxStartedAttempts": 2})
    async with run_worker([task]):
        await db.until_status(ids[0], "completed")
        row = await db.until_status(ids[1], "failed")
    assert begun == [ids[0]]
    assert row.error is not None
    job = await node.get_job("started", ids[1])
    assert job is not None
    assert row.error.reason == job["failedReason"] == "job started more than allowable limit"


async def test_an_async_backoff_strategy(run_worker: RunWorker, db: Database, node: Node) -> None:
    asked: list[tuple[int, str, str]] = []

    async def strategy(attempts_made: int, kind: str, error: BaseException, job: Any) -> int:
        asked.append((attempts_made, kind, str(error)))
        return 0 if attempts_made == 1 else -1

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    options: Any = {"settings": {"backoffStrategy": strategy}}
    task = define_task("backoffs", handler, worker_options=options)
    task_id = await db.insert_task("backoffs")
    await node.add("backoffs", {}, jobId=task_id, attempts=5, backoff={"type": "ours"})
    async with run_worker([task]):
        await db.until_status(task_id, "failed")
    assert asked == [(1, "ours", "attempt 1"), (2, "ours", "attempt 2")]
