"""Closing: at whatever instant the stop comes, every job is run or handed back, in bounded time."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.service import EXIT_CLEAN, EXIT_HANDED_BACK, WorkerService
from autoflow_worker.settings import Settings
from autoflow_worker.worker.history import JobHistory
from autoflow_worker.worker.task_worker import DRAIN_DELAY, TaskWorker
from tests.support.api import Api
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import Running, RunWorker, running
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "closing"
GRACE = 0.5
LIMIT = GRACE + 2
# What a busy machine may add to the limit.
SLACK = 10


class Handler:
    """Counts its runs, and works until it is released, or not at all."""

    def __init__(self, *, released: bool = False) -> None:
        self.runs: list[tuple[str, int]] = []
        self.cancelled = 0
        self.released = asyncio.Event()
        if released:
            self.released.set()

    async def __call__(self, payload: dict[str, object], ctx: TaskContext) -> str:
        self.runs.append((ctx.task_id, ctx.attempt))
        await self.work()
        return "done"

    async def work(self) -> None:
        await self.released.wait()


class Stubborn(Handler):
    """Swallows every cancellation."""

    async def work(self) -> None:
        while not self.released.is_set():
            try:
                await self.released.wait()
            except asyncio.CancelledError:
                self.cancelled += 1


class LastMinute(Handler):
    """Is done in the moment of its cancellation."""

    async def work(self) -> None:
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1


def a_task(handler: Any, concurrency: int = 2) -> TaskDefinition[Any]:
    return define_task(
        QUEUE,
        handler,
        TaskOptions(concurrency=concurrency),
        # Short, for the cases in which a job can only be found by the stalled check.
        worker_options={"lockDuration": 2000, "stalledInterval": 500, "maxStalledCount": 5},
    )


async def bounded_stop(worker: Running) -> int:
    """Stop it; it may not take longer than is promised."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    code = await worker.stop()
    assert loop.time() - began < LIMIT + SLACK
    return code


class Queue:
    """What Redis holds of the queue."""

    def __init__(self, redis: Redis, prefix: str) -> None:
        self.redis = redis
        self.base = f"{prefix}:{QUEUE}:"

    async def assert_nothing_is_stranded(self) -> None:
        assert await self.redis.lrange(self.base + "active", 0, -1) == []
        assert await self.redis.smembers(self.base + "stalled") == set()
        assert [key async for key in self.redis.scan_iter(self.base + "*:lock")] == []

    async def assert_nothing_is_used_up(self, job_id: str, attempts: int | None = None) -> None:
        """Neither attempts nor stalls were counted, but for the attempts that are given."""
        stalls, made = await self.redis.hmget(self.base + job_id, "stc", "atm")
        assert (stalls, made) == (None, None if attempts is None else str(attempts))

    async def until_active(self, count: int = 1) -> None:
        async def active() -> bool:
            return int(await self.redis.llen(self.base + "active")) == count

        await until(active)


@pytest.fixture
def queue(redis: Redis, prefix: str) -> Queue:
    return Queue(redis, prefix)


# -- the instant of the stop ---------------------------------------------------------------------

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
            await _until_idle(worker)
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


async def _until_idle(worker: Running) -> None:
    [task_worker] = worker.service.workers
    await until(lambda: task_worker.is_idle)


# -- handing back --------------------------------------------------------------------------------


async def test_handed_back_jobs_start_at_once_elsewhere_and_use_nothing_up(
    api: Api, queue: Queue, run_worker: RunWorker
) -> None:
    first, second = Handler(), Handler(released=True)
    async with run_worker([a_task(first)], worker_shutdown_grace=GRACE) as worker:
        ids = [await api.schedule(QUEUE, priority="critical") for _ in range(2)]
        await until(lambda: len(first.runs) == 2)
        async with run_worker([a_task(second)]) as other:
            await _until_idle(other)
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


# -- handlers that don't let go ------------------------------------------------------------------


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


# -- servers that are away -----------------------------------------------------------------------


async def go_away(server: OwnServer, how: str) -> None:
    if how == "hangs":
        server.suspend()
    else:
        await server.kill()


async def come_back(server: OwnServer, how: str) -> None:
    if how == "hangs":
        server.resume()
    else:
        await server.start()


away = pytest.mark.parametrize("how", ["hangs", "is gone"])


@away
@pytest.mark.parametrize("handler_type", [Handler, Stubborn, LastMinute])
async def test_redis_away_does_not_hold_the_exit(
    *,
    own_redis: OwnServer,
    database_url: str,
    db: Database,
    prefix: str,
    handler_type: type[Handler],
    how: str,
) -> None:
    handler, other = handler_type(), Handler(released=True)
    urls = {"redis_url": own_redis.url, "database_url": database_url, "prefix": prefix}
    async with Node(5, own_redis.url, prefix, quiet=True) as node:
        async with running([a_task(handler)], **urls, worker_shutdown_grace=GRACE) as worker:
            job_id = await node.schedule(QUEUE, task_id="not-of-the-api")
            await until(lambda: handler.runs)
            await go_away(own_redis, how)
            assert await bounded_stop(worker) == EXIT_HANDED_BACK
        await come_back(own_redis, how)
        # It could not be handed back: another worker finds it stalled.
        async with running([a_task(other)], **urls):
            await until(lambda: other.runs)
            await db.until_status(job_id, "completed")
        assert await node.get_state(QUEUE, job_id) == "completed"
    handler.released.set()


@away
async def test_redis_away_does_not_hold_the_exit_of_an_idle_worker(
    own_redis: OwnServer, database_url: str, prefix: str, how: str
) -> None:
    urls = {"redis_url": own_redis.url, "database_url": database_url, "prefix": prefix}
    tasks = [a_task(Handler())]
    async with running(tasks, **urls, worker_shutdown_grace=GRACE) as worker:
        await _until_idle(worker)
        await go_away(own_redis, how)
        assert await bounded_stop(worker) == EXIT_CLEAN


@away
@pytest.mark.parametrize("handler_type", [Handler, Stubborn, LastMinute])
async def test_postgresql_away_does_not_hold_the_exit(
    *,
    own_postgres: OwnServer,
    redis_url: str,
    node5: Node,
    queue: Queue,
    prefix: str,
    handler_type: type[Handler],
    how: str,
) -> None:
    handler, other = handler_type(), Handler(released=True)
    urls = {"redis_url": redis_url, "database_url": own_postgres.url, "prefix": prefix}
    async with running([a_task(handler)], **urls, worker_shutdown_grace=GRACE) as worker:
        job_id = await node5.schedule(QUEUE, task_id="not-of-the-api")
        await until(lambda: handler.runs)
        await go_away(own_postgres, how)
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
    await queue.assert_nothing_is_stranded()
    await queue.assert_nothing_is_used_up(job_id)
    await come_back(own_postgres, how)
    async with running([a_task(other)], **urls):

        async def completed() -> bool:
            return await node5.get_state(QUEUE, job_id) == "completed"

        await until(completed)
    assert other.runs == [(job_id, 1)]
    handler.released.set()


@away
async def test_postgresql_away_while_outcomes_wait_for_it_does_not_hold_the_exit(
    *,
    own_postgres: OwnServer,
    redis_url: str,
    node5: Node,
    queue: Queue,
    prefix: str,
    how: str,
) -> None:
    handler = Handler()
    urls = {"redis_url": redis_url, "database_url": own_postgres.url, "prefix": prefix}
    async with running([a_task(handler, 5)], **urls, worker_shutdown_grace=GRACE) as worker:
        ids = [await node5.schedule(QUEUE, task_id=f"not-of-the-api-{n}") for n in range(5)]
        await until(lambda: len(handler.runs) == 5)
        await go_away(own_postgres, how)
        handler.released.set()
        recorder = worker.service.recorder
        assert recorder is not None
        await until(recorder._outstanding if how == "hangs" else lambda: recorder._outage_since)
        assert await bounded_stop(worker) == EXIT_HANDED_BACK
    await queue.assert_nothing_is_stranded()
    await come_back(own_postgres, how)
    async with running([a_task(handler)], **urls):

        async def completed() -> bool:
            return (await node5.get_counts(QUEUE))["completed"] == 5

        await until(completed)
    for job_id in ids:
        await queue.assert_nothing_is_used_up(job_id, attempts=1)


@pytest.mark.parametrize("server", ["own_redis", "own_postgres"])
async def test_a_stop_during_the_start_is_heard_though_a_server_is_away(
    request: pytest.FixtureRequest,
    own_redis: OwnServer,
    own_postgres: OwnServer,
    server: str,
) -> None:
    hanging = {"own_redis": own_redis, "own_postgres": own_postgres}[server]
    hanging.suspend()
    settings = Settings(redis_url=own_redis.url, database_url=own_postgres.url)
    stop = asyncio.Event()
    running_service = asyncio.create_task(
        WorkerService(settings, [a_task(Handler())]).run(stop, asyncio.Event())
    )
    await asyncio.wait({running_service}, timeout=0.3)
    stop.set()
    async with asyncio.timeout(2 + SLACK):
        assert await running_service == EXIT_CLEAN
    hanging.resume()
