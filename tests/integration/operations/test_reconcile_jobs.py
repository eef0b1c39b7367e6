"""`reconcile --fix` acts on jobs: it retries what the API retried, and adds what is gone."""

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis

from autoflow_worker.broker.producer import Producer
from autoflow_worker.recording.patches import own_row_id
from tests.support.agreement import bull_jobs, differences
from tests.support.api import Api
from tests.support.node import Node
from tests.support.reconciling import QUEUE, TASK, Compare, set_rows, told
from tests.support.running import RunWorker

# -- the API's retry of a job that BullMQ still keeps --------------------------------------------


async def test_a_retry_that_bullmq_ignored_is_made_good(
    compare: Compare,
    api: Api,
    run_worker: RunWorker,
    redis: Redis,
    prefix: str,
) -> None:
    task_id = await api.schedule(QUEUE, {"bad once": True})
    other = await api.schedule(QUEUE, {"bad": True})
    async with run_worker([TASK]):
        await api.until_both_say(QUEUE, task_id, "failed")
        await api.until_both_say(QUEUE, other, "failed")
    claims = await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "ats")
    await api.retry(QUEUE, task_id)
    assert await api.node.get_state(QUEUE, task_id) == "failed", "BullMQ knows the id"
    row = await api.db.row(task_id)

    assert told(await compare()) == {task_id: ("pending", "failed", "would retry the job")}
    assert await api.node.get_state(QUEUE, task_id) == "failed", "without fix, nothing is done"
    assert told(await compare(fix=True)) == {task_id: ("pending", "failed", "retried the job")}

    assert await api.db.row(task_id) == row, "not failed again"
    assert await api.node.get_state(QUEUE, task_id) == "prioritized"
    fields = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    assert fields["ats"] == claims, "the claims are counted on"
    assert "atm" not in fields
    assert await compare() == {}
    async with run_worker([TASK]):
        done = await api.until_both_say(QUEUE, task_id, "completed")
    assert (done["attempts"], done["result"]["output"], done["error"]) == (1, {"pages": 3}, None)
    jobs = await bull_jobs(redis, prefix, QUEUE)
    assert differences(await api.db.rows(), jobs) == []


async def test_a_retry_on_which_bullmqs_script_breaks_costs_its_own_row_only(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    ids = sorted([await api.schedule(QUEUE, {"bad": True}) for _ in range(2)])
    async with run_worker([TASK]):
        for task_id in ids:
            await api.until_both_say(QUEUE, task_id, "failed")
    for task_id in ids:
        await api.retry(QUEUE, task_id)
    parent = f"{prefix}:{QUEUE}:parent"
    await redis.hset(f"{prefix}:{QUEUE}:{ids[0]}", "parentKey", parent)
    await redis.mset({parent: "", f"{parent}:unsuccessful": "no set"})

    found = await compare(fix=True)

    assert found[ids[0]].what.startswith("left: BullMQ's script breaks on the job: WRONGTYPE")
    assert found[ids[1]].what == "retried the job"


# -- jobs that are in no list --------------------------------------------------------------------


@pytest.fixture
def unlist(redis: Redis, prefix: str) -> Callable[[str], Awaitable[int]]:
    """Removes a job from `prioritized`, and leaves its hash."""
    return lambda job_id: redis.zrem(f"{prefix}:{QUEUE}:prioritized", job_id)


async def test_jobs_that_a_pause_lost_are_put_back(
    compare: Compare,
    api: Api,
    node6: Node,
    run_worker: RunWorker,
    unlist: Callable[[str], Awaitable[int]],
) -> None:
    """BullMQ 5's resume loses what is in `wait`, where BullMQ 6 keeps a paused queue's jobs."""
    in_wait, delayed = [
        await api.schedule(QUEUE, {"n": number}, opts={"priority": 0}) for number in range(2)
    ]
    await set_rows(
        api.db, '{"status": "delayed", "delayUntil": "2026-01-02T03:04:05.678Z"}', delayed
    )
    with_priority = await api.schedule(QUEUE, {})
    assert await unlist(with_priority)
    await node6.pause(QUEUE)
    await api.schedule(QUEUE, {}, opts={"priority": 0})
    await api.node.resume(QUEUE)
    lost = {in_wait, delayed, with_priority}
    assert {await api.node.get_state(QUEUE, job_id) for job_id in lost} == {"unknown"}

    found = await compare()
    assert {row_id: one.what for row_id, one in found.items()} == dict.fromkeys(
        lost, "would put the job back"
    )
    found = await compare(fix=True)
    assert {row_id: one.what for row_id, one in found.items()} == dict.fromkeys(
        lost, "put the job back"
    )
    assert await compare() == {}
    assert await api.node.get_state(QUEUE, in_wait) == "waiting"
    assert await api.node.get_state(QUEUE, with_priority) == "prioritized"
    async with run_worker([TASK]):
        for job_id in lost:
            await api.until_both_say(QUEUE, job_id, "completed")


# -- rows whose job is gone ----------------------------------------------------------------------


async def test_rows_whose_job_is_gone_fail(compare: Compare, api: Api) -> None:
    started = await api.db.insert_task(
        QUEUE, {}, status="active", startedAt="2026-01-02T03:04:05.678Z", attempts=2
    )
    assert told(await compare(lost="fail")) == {started: ("active", "gone", "would set failed")}
    assert await api.db.status(started) == "active"
    assert told(await compare(fix=True, lost="fail")) == {started: ("active", "gone", "set failed")}
    row = await api.db.row(started) or {}
    assert row["attempts"] == 2
    assert row["error"] == {
        "success": False,
        "reason": "the job is gone from Redis, so nobody can tell its end",
        "lastAttemptAt": "2026-01-02T03:04:05.678Z",
    }
    assert row["failedAt"] > row["enqueuedAt"]
    assert await compare() == {}


async def test_jobs_that_are_gone_are_added_again(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    payload = {"n": 2**70, "text": "\u00e9\u20ac", "nested": [{"a": None}]}
    task_id = await api.db.insert_task(
        QUEUE, payload, status="active", priority="critical", maxAttempts=7, attempts=3
    )
    numbered = await api.db.insert_task(QUEUE, {}, task_id=own_row_id(QUEUE, "17"))
    refused = await api.db.insert_task(QUEUE, {}, task_id="17")
    later = await api.db.insert_task(
        QUEUE, {}, status="delayed", delayUntil="2999-01-01T00:00:00.000Z"
    )
    like_the_apis = await api.schedule("other", payload, priority="critical", attempts=7)

    found = await compare(lost="requeue")
    assert {
        row_id: one.what for row_id, one in found.items() if row_id != refused
    } == dict.fromkeys((task_id, numbered, later), "would add the job again")
    assert await bull_jobs(redis, prefix, QUEUE) == {}
    found = await compare(fix=True, lost="requeue")
    what = {row_id: one.what for row_id, one in found.items()}
    assert what.pop(refused).endswith("BullMQ takes no such id for a job: use --lost fail")
    assert what == dict.fromkeys((task_id, numbered, later), "added the job again")

    ours = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    apis = await redis.hgetall(f"{prefix}:other:{like_the_apis}")
    assert ours.keys() == apis.keys()
    assert json.loads(ours["opts"]) == json.loads(apis["opts"]) | {"jobId": task_id}
    assert json.loads(ours["data"]).keys() == json.loads(apis["data"]).keys()
    assert (ours["name"], ours["priority"]) == (QUEUE, apis["priority"])
    assert await api.db.statuses() == {"pending": 4, "delayed": 1}
    assert (await compare()).keys() == {refused}
    assert await api.node.get_state(QUEUE, later) == "delayed"
    async with run_worker([TASK]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
        await api.until_both_say(QUEUE, numbered, "completed")
    assert (row["attempts"], row["payload"]) == (1, payload)


async def test_a_crash_after_the_row_was_written_leaves_it_as_lost_as_it_was(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await api.db.insert_task(QUEUE, {}, status="active", attempts=2)

    async def crash(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(Producer, "add", crash)
        with pytest.raises(asyncio.CancelledError):
            await compare(fix=True, lost="requeue")
    assert await api.db.status(task_id) == "pending"
    assert (await compare(fix=True, lost="requeue")).keys() == {task_id}
    assert await api.node.get_state(QUEUE, task_id) == "prioritized"
