"""`reconcile`: rows get what BullMQ knows of their jobs."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.kept_job import JobReader
from autoflow_worker.operations import reconcile
from autoflow_worker.recording.patches import own_row_id
from tests.support.agreement import bull_jobs, differences
from tests.support.api import Api
from tests.support.database import Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.reconciling import ACTIVE, QUEUE, TASK, Compare, Json, render, set_rows, told
from tests.support.running import RunWorker
from tests.support.until import until


def without_times(row: Json | None) -> Json:
    """A row but for the times of its end: BullMQ's are those of the acknowledgement."""
    row = dict(row or {})
    assert row.pop("completedAt") or row.pop("failedAt")
    row.pop("failedAt", None)
    return row | {"error": (row["error"] or {}) | {"lastAttemptAt": None}}


# -- what BullMQ knows ---------------------------------------------------------------------------


async def test_rows_that_an_older_worker_left_behind_get_what_bullmq_knows(
    compare: Compare, api: Api, run_worker: RunWorker
) -> None:
    db = api.db
    done = await api.schedule(QUEUE, {})
    bad = await api.schedule(QUEUE, {"bad": True})
    async with run_worker([TASK]):
        await db.until_status(done, "completed")
        await db.until_status(bad, "failed")
    before = {row_id: await db.row(row_id) or {} for row_id in (done, bad)}
    waiting = await api.schedule(QUEUE, {})
    lost = await db.insert_task(QUEUE, {})
    # As the Node worker leaves them: the job is over, and its row says `active` for ever.
    await set_rows(db, ACTIVE, done, bad, waiting)

    gone = (
        "the job was removed from Redis, or was never added;"
        " --lost fail or --lost requeue settles the row"
    )
    assert told(await compare()) == {
        done: ("active", "completed", "would set completed"),
        bad: ("active", "failed", "would set failed"),
        waiting: ("active", "prioritized", "would set pending"),
        lost: ("pending", "gone", f"would leave: {gone}"),
    }
    assert await db.status(done) == "active", "without fix, nothing is written"

    assert told(await compare(fix=True)) == {
        done: ("active", "completed", "set completed"),
        bad: ("active", "failed", "set failed"),
        waiting: ("active", "prioritized", "set pending"),
        lost: ("pending", "gone", f"left: {gone}"),
    }
    assert without_times(await db.row(done)) == without_times(before[done])
    assert without_times(await db.row(bad)) == without_times(before[bad])
    assert await db.status(waiting) == "pending"
    assert await db.status(lost) == "pending", "nobody knows what became of it"
    assert (await compare(fix=True)).keys() == {lost}


async def test_every_state_of_a_job_is_told_to_its_row(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    db, node = api.db, api.node
    running = asyncio.Event()

    async def run(payload: Json, ctx: TaskContext) -> None:
        running.set()
        await asyncio.Event().wait()

    async with run_worker([define_task("busy", run, TaskOptions(timeout_ms=None))]) as worker:
        active = await api.schedule("busy")
        await running.wait()
        shown = await db.row(active)
        delayed = await api.schedule(QUEUE, delay=3_600_000)
        due_row = await db.row(delayed) or {}
        promoted = await api.schedule(QUEUE, delay=3_600_000)
        await node.job(QUEUE, promoted, "promote")
        waiting = await db.insert_task(QUEUE, {}, status="active")
        await node.add(QUEUE, {}, jobId=waiting)
        await node.pause(QUEUE)
        paused = await db.insert_task(QUEUE, {}, status="active")
        await node.add(QUEUE, {}, jobId=paused)
        await set_rows(db, '{"status": "pending", "startedAt": null, "attempts": 0}', active)
        await set_rows(db, '{"status": "active", "delayUntil": null}', delayed)

        assert {row_id: one.what for row_id, one in (await compare(fix=True)).items()} == {
            active: "set active",
            delayed: "set delayed",
            promoted: "set pending",
            waiting: "set pending",
            paused: "set pending",
        }
        assert await db.row(active) == shown
        row = await db.row(delayed) or {}
        assert row["delayUntil"][:17] == due_row["delayUntil"][:17]
        assert (await db.row(promoted) or {})["delayUntil"] is None
        assert await compare() == {}
        await worker.abort()
    assert await db.status(active) == "pending"
    assert await compare() == {}, "a job that was handed back is no difference"


async def test_a_healthy_system_has_no_differences(compare: Compare, api: Api) -> None:
    await api.schedule(QUEUE, {})
    await api.schedule(QUEUE, {}, delay=3_600_000)
    assert await compare(fix=True, lost="requeue") == {}


async def test_beside_a_busy_worker_it_breaks_nothing(
    api: Api, run_worker: RunWorker, redis_url: str, redis: Redis, prefix: str
) -> None:
    async def flaky(payload: Json, ctx: TaskContext) -> int:
        await asyncio.sleep(0.05)
        if payload["fails"] >= ctx.attempt:
            raise ValueError("not yet")
        return ctx.attempt

    keep_all = {"removeOnComplete": False, "removeOnFail": False}
    jobs = [Scheduled({"fails": n % 4}, backoff=20, opts=keep_all) for n in range(300)]
    await api.db.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
    await api.node.schedule_all(QUEUE, jobs)
    client = PipelinedRedis(redis_url)
    await client.open(30)
    rounds: list[list[str]] = []
    async with run_worker([define_task(QUEUE, flaky, TaskOptions(concurrency=10))]):
        while set(await api.db.statuses()) - {"completed", "failed"}:
            found = reconcile.reconcile(client, api.db.url, prefix, fix=True, lost="fail")
            async with aclosing(found):
                rounds.append([difference.what async for difference in found])
        await until(lambda: all_acknowledged(redis, prefix))
    await client.aclose()

    # A job whose backoff has ended waits for its turn, which nobody tells its row before. The other
    # two are for a machine so busy that a worker takes a second from one store to the next.
    said = {what for found in rounds for what in found}
    assert said <= {"set pending", "set active", "set delayed"}
    assert await api.db.statuses() == {"completed": 225, "failed": 75}
    assert differences(await api.db.rows(), await bull_jobs(redis, prefix, QUEUE)) == []


async def all_acknowledged(redis: Redis, prefix: str) -> bool:
    return await redis.llen(f"{prefix}:{QUEUE}:active") == 0


async def test_a_row_that_changes_while_it_settles_is_no_difference(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await api.db.insert_task(QUEUE, {}, status="active")
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 1.0)
    comparing = asyncio.create_task(compare(fix=True, lost="fail"))
    while not comparing.done():
        await set_rows(api.db, "{}", task_id)
        await asyncio.sleep(0.05)
    assert await comparing == {}
    assert await api.db.status(task_id) == "active"


async def test_a_row_is_written_only_while_it_is_as_it_was_compared(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API cancels the task after it was compared, before anything is done about it."""
    cancelled = await api.db.insert_task(QUEUE, {}, status="active")
    look = JobReader.look

    async def look_and_cancel(self: Any, *args: Any, **options: Any) -> Any:
        job = await look(self, *args, **options)
        if options["fields"]:
            await set_rows(api.db, '{"status": "cancelled"}', cancelled)
        return job

    monkeypatch.setattr(JobReader, "look", look_and_cancel)
    for lost in ("fail", "requeue", None):
        await set_rows(api.db, '{"status": "active"}', cancelled)
        assert await compare(fix=True, lost=lost) == {}
        assert await api.db.status(cancelled) == "cancelled"
    assert await api.node.get_job(QUEUE, cancelled) is None


async def test_jobs_of_rows_with_an_id_of_their_own_are_found(
    compare: Compare, api: Api, run_worker: RunWorker
) -> None:
    queue = "old:reports"
    task = define_task(queue, render)
    number = await api.node.add(queue, {})
    row_id = own_row_id(queue, number)
    # A job whose id is that of another queue's row has its story in a row of its own, too.
    theirs = await api.db.insert_task(QUEUE, {})
    await api.node.add(queue, {}, jobId=theirs)
    own = await api.db.insert_task(queue, {}, task_id=own_row_id(queue, theirs))
    async with run_worker([task]):
        await api.db.until_status(row_id, "completed")
        await until(lambda: has_finished(api.node, queue, theirs))
    await set_rows(api.db, ACTIVE, row_id, own)

    found = await compare(fix=True)

    assert {r: one.what for r, one in found.items() if r != theirs} == {
        row_id: "set completed",
        own: "set completed",
    }
    assert found[theirs].state == "gone", "the job is another queue's"


async def has_finished(node: Node, queue: str, job_id: str) -> bool:
    return await node.get_state(queue, job_id) == "completed"


# -- jobs that can't be read ---------------------------------------------------------------------


async def test_jobs_that_cant_be_read_cost_their_own_row_only(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    ids = [await api.schedule(QUEUE, {}) for _ in range(8)]
    async with run_worker([TASK]):
        for task_id in ids:
            await api.until_both_say(QUEUE, task_id, "completed")
    base = f"{prefix}:{QUEUE}:"
    text, no_opts, no_result, no_times, no_fields, raw, no_job, good = ids
    await redis.delete(base + text)
    await redis.set(base + text, "no hash")
    await redis.hset(base + no_opts, mapping={"opts": "{", "data": "[", "timestamp": "never"})
    await redis.hset(base + no_result, "returnvalue", '{"success": tr')
    await redis.hset(base + no_times, mapping={"finishedOn": "0", "processedOn": "soon"})
    await redis.hdel(base + no_fields, *(await redis.hkeys(base + no_fields)))
    await redis.hset(base + no_fields, "x", "y")
    await redis.hset(base + raw, mapping={"returnvalue": b'"\xff\\u0000"', "atm": b"\xfe"})
    await redis.delete(base + no_job)
    hostile = await api.db.insert_task(QUEUE, {}, task_id="a\ufffdb")
    await set_rows(api.db, ACTIVE, *ids)

    found = await compare(fix=True)

    what = {row_id: one.what for row_id, one in found.items()}
    assert what.pop(text) == (
        "left: the job can't be read: its key, or one of its queue, holds another type of data"
    )
    assert what.pop(no_result) == (
        "set completed, without the output, as the job's return value can't be read"
    )
    assert what.pop(no_job).startswith("left: the job's fields are gone")
    assert what.pop(hostile).startswith("left: ")
    assert what == dict.fromkeys((no_opts, no_times, no_fields, raw, good), "set completed")
    for row_id in (no_times, no_fields):
        row = await api.db.row(row_id) or {}
        assert row["completedAt"][:4] >= "2026", "BullMQ's set of completed jobs has the time"
    assert (await api.db.row(raw) or {})["result"]["output"] == "\ufffd\ufffd"


async def test_rows_that_name_no_queue_are_left(compare: Compare, db: Database) -> None:
    task_id = await db.insert_task("", {})
    assert told(await compare(fix=True, lost="fail")) == {
        task_id: ("pending", "-", "left: the row names no queue")
    }


# -- many rows -----------------------------------------------------------------------------------


async def test_pages_and_batches_leave_nothing_out(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.operations.reconcile.PAGE", 7)
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SUSPECTS", 10)
    ids = {new_task_id() for _ in range(100)}
    await api.db.insert_tasks(QUEUE, {task_id: {} for task_id in ids})
    await api.db.insert_tasks(QUEUE, {new_task_id(): {} for _ in range(50)}, status="completed")
    assert (await compare()).keys() == ids
    assert (await compare(fix=True, lost="fail")).keys() == ids
    assert await api.db.statuses() == {"failed": 100, "completed": 50}
    assert await compare() == {}
