"""Batch tasks on real servers: each job keeps its own row, lock and attempt."""

import asyncio
import base64
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    RetryLater,
    TaskDefinition,
    TaskOptions,
    UnrecoverableError,
    define_task,
)
from tests.support.agreement import bull_jobs, differences
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.plain import blocked
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"
FOREVER = 60_000


class Wanted(BaseModel):
    """What is to become of a job. The handler raises if it finds a `raise`."""

    end: str


Items = Sequence[BatchItem[Wanted]]


async def schedule(
    node: Node, db: Database, ends: Sequence[object], **job: Any
) -> dict[str, object]:
    """Add a job for each end; return the ends by the jobs' ids."""
    jobs = [Scheduled({"end": end}, **job) for end in ends]
    attempts = {"maxAttempts": jobs[0].attempts}
    await db.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs}, **attempts)
    await node.schedule_all(QUEUE, jobs)
    return {job.task_id: job.payload["end"] for job in jobs}


class Gate:
    """A batch handler that settles what says so, and then waits until it is opened."""

    def __init__(self) -> None:
        self.items: dict[str, BatchItem[Wanted]] = {}
        self.opened = asyncio.Event()

    async def handler(self, items: Items, ctx: BatchContext) -> None:
        for item in items:
            self.items[item.ctx.task_id] = item
            if item.payload.end == "complete":
                item.complete("settled")
        await self.opened.wait()

    def task(self, size: int, **options: Any) -> TaskDefinition[Any]:
        own = TaskOptions(timeout_ms=options.pop("timeout_ms", None))
        batch = BatchOptions(size=size, wait_ms=options.pop("wait_ms", FOREVER))
        return define_task(QUEUE, self.handler, own, batch=batch, **options)

    async def until_begun(self, count: int) -> None:
        await until(lambda: len(self.items) == count)


# -- any mix of settlements ----------------------------------------------------------------------

SETTLED = {
    "complete": "completed",
    "unrecoverable": "failed",
    "fail": "failed",
    "twice": "completed",
    "unstorable": "failed",
    "later": "completed",
    "reported": "failed",
    "nothing": "completed",
}


def settle(item: BatchItem[Wanted], seen: Counter[str]) -> None:
    end = item.payload.end
    if end == "complete":
        item.complete({"n": item.ctx.attempt})
    elif end == "unrecoverable":
        item.fail(UnrecoverableError("never"))
    elif end == "fail":
        item.fail(ValueError(item.ctx.task_id))
    elif end == "twice":
        item.complete("first")
        item.fail(ValueError("second"))
    elif end == "unstorable":
        item.complete(object())
    elif end == "later" and seen[item.ctx.task_id] == 1:
        item.retry_later(0.01)
    elif end == "reported":
        item.complete({"success": False, "reason": "as Node's handlers report it"})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_any_mix_of_settlements_leaves_both_stores_in_agreement(
    node5: Node,
    db: Database,
    redis: Redis,
    prefix: str,
    run_worker: RunWorker,
    *,
    seed: int,
    kind: str,
) -> None:
    dice = random.Random(f"{kind} {seed}")
    seen: Counter[str] = Counter()
    raised: set[str] = set()
    sizes: list[int] = []
    errors = [ValueError("all"), UnrecoverableError("all"), RetryLater(0), RetryLater(0.01)]

    def body(items: Items) -> None:
        sizes.append(len(items))
        seen.update(item.ctx.task_id for item in items)
        trouble = dice.random() < 0.2 and dice.choice(errors)
        cut = dice.randrange(len(items) + 1) if trouble else len(items)
        for item in items[:cut]:
            settle(item, seen)
        if trouble:
            raised.update(item.ctx.task_id for item in items if item.settlement is None)
            raise trouble

    async def handler(items: Items, ctx: BatchContext) -> None:
        body(items)

    def sync_handler(items: Items, ctx: BatchContext) -> None:
        body(items)

    ends: list[object] = dice.choices([*SETTLED], k=120)
    size = dice.choice([1, 7, 50])
    task = define_task(
        QUEUE,
        handler if kind == "async" else sync_handler,
        TaskOptions(concurrency=dice.choice([1, 3]) if kind == "async" else 1),
        batch=BatchOptions(size=size, wait_ms=dice.choice([0, 5])),
    )
    scheduled = await schedule(node5, db, [*ends, 1, None, ["no text"]], attempts=3, backoff=1)

    async def has_ended() -> bool:
        return (await db.statuses()).keys() <= {"completed", "failed"}

    async with run_worker([task]):
        await until(has_ended)
    rows, jobs = await db.rows(), await bull_jobs(redis, prefix, QUEUE)
    assert rows.keys() == jobs.keys() == scheduled.keys()
    assert differences(rows, jobs) == []
    assert max(sizes) <= size
    for task_id, end in scheduled.items():
        if isinstance(end, str):
            assert rows[task_id]["status"] == SETTLED[end] or task_id in raised
        else:
            assert rows[task_id]["error"]["reason"].startswith("payload does not validate: end:")
            assert task_id not in seen


async def test_a_backlog_is_run_in_full_batches(
    node6: Node, db: Database, run_worker: RunWorker
) -> None:
    sizes: list[int] = []

    async def handler(items: Items, ctx: BatchContext) -> None:
        sizes.append(len(items))

    task = define_task(QUEUE, handler, batch=BatchOptions(size=100, wait_ms=FOREVER))
    await schedule(node6, db, ["nothing"] * 1000)

    async def has_ended() -> bool:
        return await db.statuses() == {"completed": 1000}

    async with run_worker([task]):
        await until(has_ended)
    assert sizes == [100] * 10


# -- ends that come from outside -----------------------------------------------------------------


async def test_at_the_time_limit_settled_items_are_completed(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    gate = Gate()
    ends = await schedule(node5, db, ["complete", "nothing", "nothing"], attempts=1)
    async with run_worker([gate.task(3, timeout_ms=50)]):
        for task_id, end in ends.items():
            row = await db.until_status(task_id, "completed", "failed")
            if end == "complete":
                assert row.status == "completed"
            else:
                assert row.error is not None
                assert row.error.reason == "the handler ran past its time limit of 50 ms"


async def test_one_task_is_cancelled_and_the_others_go_on(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    gate = Gate()
    ids = list(await schedule(node5, db, ["nothing"] * 4))
    async with run_worker([gate.task(4)]):
        await gate.until_begun(4)
        for task_id in ids[:2]:
            await db.execute(
                """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s""",
                task_id,
            )
        await until(lambda: all(gate.items[task_id].ctx.cancelled for task_id in ids[:2]))
        gate.items[ids[1]].complete("finished all the same")
        gate.opened.set()
        for task_id in ids[1:]:
            await db.until_status(task_id, "completed")

        async def has_failed() -> bool:
            return await node5.get_state(QUEUE, ids[0]) == "failed"

        await until(has_failed)
    assert await db.statuses() == {"cancelled": 1, "completed": 3}
    job = await node5.get_job(QUEUE, ids[0])
    assert job is not None
    assert job["failedReason"] == "the task is cancelled"


async def test_at_the_deadline_open_items_are_handed_back(
    node5: Node, db: Database, redis: Redis, prefix: str, run_worker: RunWorker
) -> None:
    gate = Gate()
    ends = await schedule(node5, db, ["complete", "complete", "nothing", "nothing"])

    async def are_settled() -> bool:
        counts = await node5.get_counts(QUEUE)
        return counts["completed"] == 2

    async with run_worker([gate.task(4)]) as worker:
        await until(are_settled)
        await worker.abort()
    jobs = await bull_jobs(redis, prefix, QUEUE)
    for task_id, end in ends.items():
        assert await db.status(task_id) == ("completed" if end == "complete" else "pending")
        assert not jobs[task_id].locked
        if end == "nothing":
            assert jobs[task_id].status != "completed"
            assert jobs[task_id].fields.get("atm", "0") == "0", "no attempt is used up"


async def test_a_batch_that_runs_is_waited_for_at_the_end(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    gate = Gate()
    trailing: list[str] = []

    async def handler(items: Items, ctx: BatchContext) -> None:
        await gate.handler(items, ctx)
        trailing.append("committed")

    task = define_task(QUEUE, handler, batch=BatchOptions(size=2, wait_ms=FOREVER))
    await schedule(node5, db, ["complete"] * 2)
    async with run_worker([task]) as worker:
        await gate.until_begun(2)
        worker.stopping.set()
        await until(lambda: next(iter(gate.items.values())).ctx.stopping)
        gate.opened.set()
        assert await worker.stop() == 0
    assert trailing == ["committed"]
    assert await db.statuses() == {"completed": 2}


async def test_a_lost_lock_costs_its_own_job_only(
    node5: Node, db: Database, redis: Redis, prefix: str, run_worker: RunWorker
) -> None:
    gate = Gate()
    ids = list(await schedule(node5, db, ["nothing"] * 3))
    options: Any = {"lockDuration": 1000, "stalledInterval": FOREVER}
    lock = f"{prefix}:{QUEUE}:{ids[0]}:lock"
    async with run_worker([gate.task(3, worker_options=options)]):
        await gate.until_begun(3)
        await redis.set(lock, "another worker's")
        over = time.monotonic() + 1.5
        await until(lambda: time.monotonic() > over)
        gate.opened.set()
        for task_id in ids[1:]:
            await db.until_status(task_id, "completed")
    assert await db.status(ids[0]) == "active"
    assert await redis.get(lock) == "another worker's"


# -- places --------------------------------------------------------------------------------------


async def test_a_job_that_finds_no_place_stays_in_the_queue_for_another_worker(
    node5: Node, db: Database, redis: Redis, prefix: str, run_worker: RunWorker
) -> None:
    """A slot of the busy worker waits for the queue's marker when the batch begins."""
    busy, free = Gate(), Gate()
    options: Any = {"drainDelay": 60, "stalledInterval": 600_000}
    connection = f"{prefix}:{base64.b64encode(QUEUE.encode()).decode()}"

    async def is_waiting_or_has_begun() -> bool:
        return bool(busy.items or await blocked(redis, connection))

    async with run_worker([busy.task(10, wait_ms=500, worker_options=options)]):
        while True:
            [first] = await schedule(node5, db, ["nothing"])
            await db.until_status(first, "active")
            await until(is_waiting_or_has_begun)
            if not busy.items:
                break
            # This machine is slow: the batch began first.
            busy.opened.set()
            await db.until_status(first, "completed")
            busy.opened.clear()
            busy.items.clear()
        await busy.until_begun(1)
        [task_id] = await schedule(node5, db, ["nothing"])
        async with run_worker([free.task(1, worker_options=options)]):
            await free.until_begun(1)
            free.opened.set()
            await db.until_status(task_id, "completed")
            assert [*busy.items] == [first]
            busy.opened.set()


async def test_batches_that_are_too_many_end_the_start(run_worker: RunWorker) -> None:
    task = Gate().task(1000)
    with pytest.raises(Exception, match="11 batches of 1000 are more than 10000 jobs at once"):
        async with run_worker([task], worker_concurrency=11):
            pass
