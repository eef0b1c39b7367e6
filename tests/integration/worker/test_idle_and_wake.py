"""An idle worker costs next to nothing, and wakes at once: by BullMQ's marker, or at a job's time.

`drainDelay` is a minute as a rule: whatever happens earlier, happens not because the queue was
asked for the fun of it. A delayed job that is known ends each wait after 10 s, as with Node.
"""

import asyncio
import base64
import itertools
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from bullmq import Job, Queue
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.worker import fetcher
from tests.support.database import Database
from tests.support.plain import blocked, clients, producer, until_idle
from tests.support.running import RunWorker, running
from tests.support.servers import OwnServer
from tests.support.until import PATIENCE, until

Payload = dict[str, Any]
DOZY: Any = {"drainDelay": 60, "stalledInterval": 600_000}


@pytest.fixture
async def queue(redis_url: str, prefix: str) -> AsyncIterator[Queue]:
    async with producer("naps", redis_url, prefix) as made:
        yield made


@pytest.fixture
def name(prefix: str) -> str:
    """What the worker's connection is called."""
    return f"{prefix}:{base64.b64encode(b'naps').decode()}"


async def handler(payload: Payload, ctx: TaskContext) -> int:
    """Return when it was started, in epoch ms."""
    return time.time_ns() // 1_000_000


def dozy_task(concurrency: int = 1, **options: Any) -> TaskDefinition[Payload]:
    worker_options: Any = {**DOZY, **options}
    concurrent = TaskOptions(concurrency=concurrency)
    return define_task("naps", handler, options=concurrent, worker_options=worker_options)


async def started_ms(db: Database, job: Job) -> int:
    """When a job's handler was started, of one that completes in the end."""
    task = await db.until_status(job.id, "completed")
    assert task.result is not None
    output: int = task.result.output
    return output


# -- what being idle costs -------------------------------------------------------------------------


@pytest.mark.parametrize("concurrency", [1, 50])
async def test_an_idle_task_is_one_blocked_connection(
    own_redis: OwnServer, database_url: str, prefix: str, concurrency: int
) -> None:
    options: Any = {"drainDelay": 0.2, "stalledInterval": 600_000}
    tasks = [
        define_task(
            queue, handler, options=TaskOptions(concurrency=concurrency), worker_options=options
        )
        for queue in ("one", "two")
    ]
    async with (
        Redis.from_url(own_redis.url, decode_responses=True) as redis,
        running(tasks, redis_url=own_redis.url, database_url=database_url, prefix=prefix),
    ):
        names = [f"{prefix}:{base64.b64encode(q.encode()).decode()}" for q in ("one", "two")]
        for name in names:
            await until_idle(redis, name)
        me = await redis.client_id()
        others = [client for client in await redis.client_list() if client["id"] != str(me)]
        # The queues', and the one that everything shares.
        assert sorted(client["name"] for client in others) == ["", *sorted(names)]

        async def asked() -> dict[str, int]:
            stats = await redis.info("commandstats")
            found = {key.removeprefix("cmdstat_"): s["calls"] for key, s in stats.items()}
            # Not what this test asks, and not what scripts do inside.
            return {key: found.get(key, 0) for key in ("bzpopmin", "evalsha", "client|unblock")}

        async def has_read(times: int) -> bool:
            return (await asked())["bzpopmin"] >= before["bzpopmin"] + times

        before, since = await asked(), time.monotonic()
        await until(lambda: has_read(10))
        after, elapsed = await asked(), time.monotonic() - since
        count = sum(after.values()) - sum(before.values())
        # Three commands in two drainDelays for each queue, and a part at the interval's ends.
        assert count <= 2 * (1.5 * elapsed / options["drainDelay"] + 3)


# -- waking ----------------------------------------------------------------------------------------


async def test_a_job_wakes_an_idle_queue(
    run_worker: RunWorker, redis: Redis, queue: Queue, db: Database, name: str
) -> None:
    async with run_worker([dozy_task(concurrency=3)]):
        for n in range(3):
            await until_idle(redis, name)
            await started_ms(db, await queue.add("naps", {}, {"jobId": f"job-{n}"}))


async def test_each_of_two_idle_workers_wakes(
    run_worker: RunWorker, queue: Queue, db: Database, redis: Redis, name: str
) -> None:
    async def both_idle() -> bool:
        return len(await blocked(redis, name)) == 2

    gate = asyncio.Event()

    async def waits(payload: Payload, ctx: TaskContext) -> None:
        await gate.wait()

    task = define_task("naps", waits, worker_options=DOZY)
    async with run_worker([task]), run_worker([task]):
        await until(both_idle)
        jobs = [await queue.add("naps", {}, {"jobId": f"job-{n}"}) for n in range(2)]
        for job in jobs:
            await db.until_status(job.id, "active")
        gate.set()


async def test_delayed_jobs_start_at_their_time(
    run_worker: RunWorker, redis: Redis, queue: Queue, db: Database, name: str
) -> None:
    async with run_worker([dozy_task()]):
        await until_idle(redis, name)
        # A later one first: the worker that waits for it has to learn of the earlier ones.
        delays = [700, 300, 500, 1]
        jobs = [
            await queue.add("naps", {}, {"jobId": f"after-{delay}", "delay": delay})
            for delay in delays
        ]
        started = [await started_ms(db, job) for job in jobs]
    due = [job.timestamp + delay for job, delay in zip(jobs, delays, strict=True)]
    assert all(at >= when for at, when in zip(started, due, strict=True))
    in_order = [at for _, at in sorted(zip(due, started, strict=True))]
    assert in_order == sorted(started)


async def test_delayed_jobs_that_there_were_before_the_worker(
    run_worker: RunWorker, queue: Queue, db: Database
) -> None:
    job = await queue.add("naps", {}, {"jobId": "early", "delay": 600})
    async with run_worker([dozy_task()]):
        assert await started_ms(db, job) >= job.timestamp + 600


@pytest.mark.parametrize("backoff", [{"type": "fixed", "delay": 300}, 300, None])
async def test_a_backoff_ends_at_its_time(
    run_worker: RunWorker, queue: Queue, db: Database, backoff: object
) -> None:
    attempts: list[float] = []

    async def fails_at_first(payload: Payload, ctx: TaskContext) -> None:
        attempts.append(time.monotonic())
        if ctx.attempt < 3:
            raise ValueError("not yet")

    task = define_task("naps", fails_at_first, worker_options=DOZY)
    async with run_worker([task]):
        options = {"jobId": "again", "attempts": 3, "backoff": backoff}
        job = await queue.add("naps", {}, options)
        await db.until_status(job.id, "completed")
    assert len(attempts) == 3
    if backoff:
        # BullMQ's milliseconds are of another clock than these.
        assert all(b - a >= 0.29 for a, b in itertools.pairwise(attempts))


async def test_a_delayed_job_of_a_worker_that_closes(
    run_worker: RunWorker, redis: Redis, queue: Queue, db: Database, name: str
) -> None:
    async def both_idle() -> bool:
        return len(await blocked(redis, name)) == 2

    async with run_worker([dozy_task()]) as first:
        await until_idle(redis, name)
        async with run_worker([dozy_task()]):
            await until(both_idle)
            job = await queue.add("naps", {}, {"jobId": "handed-on", "delay": 500})
            # Who waits longest takes the marker, and so knows the time.
            assert await first.stop() == 0
            assert await started_ms(db, job) >= job.timestamp + 500


async def test_a_marker_that_died_with_its_worker_is_made_good(
    run_worker: RunWorker, redis: Redis, queue: Queue, db: Database, name: str
) -> None:
    async with run_worker([dozy_task(drainDelay=0.3)]):
        await until_idle(redis, name)
        async with queue.client.pipeline(transaction=True) as transaction:
            await queue.scripts.addJob(Job(queue, "naps", {}, {"jobId": "unseen"}), transaction)
            transaction.delete(queue.keys["marker"])
            await transaction.execute()
        await db.until_status("unseen", "completed")


async def test_markers_of_delayed_jobs_do_not_put_off_a_job_without_one(
    run_worker: RunWorker,
    redis: Redis,
    queue: Queue,
    db: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_started = asyncio.Event()

    async def add_delayed_jobs() -> None:
        # Not cancelled: redis-py may swallow a cancellation in the middle of a command.
        while not has_started.is_set():
            await queue.add("naps", {}, {"delay": 600_000})
            await asyncio.sleep(0.05)

    monkeypatch.setattr(fetcher, "MAX_BLOCK", 0.5)
    async with run_worker([dozy_task()]), asyncio.TaskGroup() as group:
        await started_ms(db, await queue.add("naps", {}, {"jobId": "first"}))
        group.create_task(add_delayed_jobs())
        async with queue.client.pipeline(transaction=True) as transaction:
            await queue.scripts.addJob(Job(queue, "naps", {}, {"jobId": "unseen"}), transaction)
            transaction.zrem(queue.keys["marker"], "0")
            await transaction.execute()
        try:
            await db.until_status("unseen", "completed")
        finally:
            has_started.set()


async def test_stopping_does_not_wait_for_a_delayed_job(
    run_worker: RunWorker, queue: Queue, redis: Redis, name: str
) -> None:
    async with run_worker([dozy_task()], worker_shutdown_grace=600) as worker:
        await until_idle(redis, name)
        await queue.add("naps", {}, {"delay": 600_000})
        async with asyncio.timeout(PATIENCE):
            assert await worker.stop() == 0
        assert await clients(redis, name) == []
