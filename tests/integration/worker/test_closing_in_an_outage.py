"""Closing while a server is away: it takes no longer, and every job is run later."""

import asyncio

import pytest

from autoflow_worker.service import EXIT_CLEAN, EXIT_HANDED_BACK, WorkerService
from autoflow_worker.settings import Settings
from tests.support.closing import (
    GRACE,
    QUEUE,
    SLACK,
    Handler,
    LastMinute,
    Queue,
    Stubborn,
    a_task,
    bounded_stop,
    until_idle,
)
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import running
from tests.support.servers import OwnServer
from tests.support.until import until


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
        await until_idle(worker)
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
        await until(lambda: recorder.outstanding if how == "hangs" else recorder.is_away)
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
