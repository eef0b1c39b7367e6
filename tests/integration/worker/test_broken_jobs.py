"""Jobs on which BullMQ's own scripts break, and jobs that Redis loses while a worker has them.

Each costs itself, and neither others nor the worker.
"""

import json

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from tests.support.api import Api
from tests.support.node import Node
from tests.support.plain import state
from tests.support.poisoned import OPTIONS, QUEUE, Poisoned
from tests.support.running import RunWorker
from tests.support.until import until


async def test_a_job_that_the_stalled_check_breaks_on(
    run_worker: RunWorker, poisoned: Poisoned
) -> None:
    """A worker died with both in its hands; the sound one still has to come back."""
    await poisoned.raw.set(poisoned.base + b"a-text", "no hash")
    await poisoned.add("sound")
    await poisoned.raw.delete(poisoned.base + b"wait")
    for job_id in (b"a-text", b"sound"):
        await poisoned.raw.lpush(poisoned.base + b"active", job_id)
        await poisoned.raw.sadd(poisoned.base + b"stalled", job_id)
    with capture_logs() as logs:
        async with run_worker([poisoned.task()]):
            await poisoned.db.until_status("sound", "completed")
            await poisoned.until_all_ended()
    assert len([entry for entry in logs if entry["event"] == "stalled_check_refused"]) == 1
    await poisoned.check_completed("sound")


async def test_a_completed_job_that_bullmq_can_not_finish_stays_completed(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """The handler did the work, and then broke what BullMQ's script counts with."""

    async def handler(payload: object, ctx: TaskContext) -> str:
        await redis.hset(f"{prefix}:{QUEUE}:{ctx.task_id}", "atm", "x")
        return "done"

    with capture_logs() as logs:
        async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
            task_id = await api.schedule(QUEUE)
            row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["result"]["output"] == "done"
    assert "job_buried" in {entry["event"] for entry in logs}
    value = await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "returnvalue")
    assert json.loads(value or "") == row["result"]


async def test_a_job_that_another_worker_has_is_not_buried(
    redis_url: str, redis: Redis, prefix: str, node5: Node
) -> None:
    client = PipelinedRedis(redis_url)
    await client.open(15)
    try:
        queue = JobQueue(QUEUE, client, prefix, {})
        job_id = await node5.schedule(QUEUE)
        claim = (await queue.fetch("ours")).claim
        assert claim is not None
        await redis.set(f"{prefix}:{QUEUE}:{job_id}:lock", "theirs")
        assert not await queue.bury(claim, "failedReason", "no reason", None)
        assert await state(redis, prefix, QUEUE, job_id) == "active"
        await redis.set(f"{prefix}:{QUEUE}:{job_id}:lock", "ours")
        assert await queue.bury(claim, "failedReason", "no reason", None)
        assert await state(redis, prefix, QUEUE, job_id) == "failed"
    finally:
        await client.aclose()


async def test_a_queue_that_is_broken_itself_does_not_cost_the_others(
    run_worker: RunWorker, poisoned: Poisoned, node5: Node
) -> None:
    """As by a job whose id is the name of one of the queue's own keys."""
    await poisoned.raw.set(poisoned.base + b"failed", "no sorted set")
    await poisoned.add("fails-1")
    with capture_logs() as logs:
        async with run_worker([poisoned.task(), define_task("other", poisoned.handler)]):
            await until(lambda: "job_not_buried" in {entry["event"] for entry in logs})
            await poisoned.db.until_status("fails-1", "failed")
            other = await node5.schedule("other", task_id="not-of-the-api")
            await poisoned.db.until_status(other, "completed")


async def test_a_poisoned_child_fails_its_parent(
    run_worker: RunWorker, api: Api, node5: Node, redis: Redis, prefix: str
) -> None:
    async def handler(payload: object, ctx: TaskContext) -> None:
        pytest.fail("none of them can run")

    for child_id, name, value in (("child-1", "data", "{"), ("child-2", "opts", "5")):
        parent_id = f"parent-of-{child_id}"
        child = {
            "name": "child",
            "queueName": "children",
            "opts": {"jobId": child_id, "failParentOnFailure": True},
        }
        await node5.flow(
            {
                "name": "parent",
                "queueName": "parents",
                "opts": {"jobId": parent_id},
                "children": [child],
            }
        )
        await redis.hset(f"{prefix}:children:{child_id}", name, value)
    tasks = [define_task(name, handler) for name in ("parents", "children")]
    async with run_worker(tasks):
        for child_id in ("child-1", "child-2"):
            await api.until_both_say("children", child_id, "failed")
            row = await api.until_both_say("parents", f"parent-of-{child_id}", "failed")
            assert row["error"]["reason"] == f"child {prefix}:children:{child_id} failed"


async def test_a_job_that_redis_forgets_while_it_runs_stays_completed(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """As by an eviction: its hash and its lock are gone, and its id is still active."""
    base = f"{prefix}:{QUEUE}:"

    async def handler(payload: object, ctx: TaskContext) -> str:
        await redis.delete(base + ctx.task_id, f"{base}{ctx.task_id}:lock")
        return "done"

    async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
        task_id = await api.schedule(QUEUE)
        row = await api.db.until_status(task_id, "completed")
        await until(lambda: _is_empty(redis, base + "active"))
    assert await api.db.task(task_id) == row
    assert await redis.exists(base + task_id) == 0


async def test_a_finished_row_stays_as_it_is_when_its_job_comes_back_without_data(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """A worker died with the job in its hands, and Redis lost its hash and its lock."""
    base = f"{prefix}:{QUEUE}:"

    async def handler(payload: object, ctx: TaskContext) -> None:
        raise AssertionError("it never runs")

    done, open_ = "the-finished-one", "the-open-one"
    await api.db.insert_tasks(QUEUE, {done: {}}, status="completed")
    await api.db.insert_tasks(QUEUE, {open_: {}}, status="active")
    before = await api.db.task(done)
    await redis.lpush(base + "active", done, open_)
    await redis.sadd(base + "stalled", done, open_)
    async with run_worker([define_task(QUEUE, handler, worker_options=OPTIONS)]):
        await api.db.until_status(open_, "failed")
        await until(lambda: _is_empty(redis, base + "active"))

        async def is_gone() -> bool:
            return await redis.exists(base + done) == 0

        await until(is_gone)
    assert await api.db.task(done) == before
    assert await state(redis, prefix, QUEUE, done) == ""


async def _is_empty(redis: Redis, key: str) -> bool:
    return await redis.llen(key) == 0
