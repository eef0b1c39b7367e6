"""The traps of bullmq 3.4's own `Worker` in closing it while jobs run, or arrive.

docs/internals.md lists them. Where it can be shown, a test first runs the official Worker into
the trap, on the queue `plain`, and then this worker past it, on the queue `ours`.
"""

import asyncio
from functools import partial
from typing import Any

import pytest
from bullmq import Job, Worker
from redis.exceptions import ConnectionError as RedisConnectionError

from autoflow_worker import TaskContext, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.worker.task_worker import TaskWorker
from tests.support.database import Database
from tests.support.plain import (
    until_idle,
    until_renewed,
)
from tests.support.proxy import Proxy
from tests.support.scripts import sha_of
from tests.support.stage import NO_LIMIT, Payload, Stage
from tests.support.until import PATIENCE, until


async def test_02_locks_are_renewed_until_the_last_job_has_ended(
    stage: Stage, db: Database
) -> None:
    gates: dict[str, asyncio.Event] = {}

    async def plain(job: Job, token: str) -> None:
        await gates.setdefault(job.id, asyncio.Event()).wait()

    async def ours(payload: Payload, ctx: TaskContext) -> None:
        await gates.setdefault(ctx.task_id, asyncio.Event()).wait()

    options: Any = {"lockDuration": 2000, "stalledInterval": 60_000}
    short, long = [await stage.plain.add("plain", {}) for _ in range(2)]
    async with stage.run_plain(plain, concurrency=2, **options) as worker:
        await until(lambda: len(gates) == 2)
        closing = asyncio.create_task(worker.close())
        await until(lambda: worker.closing)
        gates[short.id].set()
        # The handler of the long one goes on, and its lock is gone.
        await until(partial(stage.is_missing, stage.key("plain", f"{long.id}:lock")))
        gates[long.id].set()
        await asyncio.wait({closing}, timeout=PATIENCE)
    assert any("Missing lock" in error for error in worker.errors)
    assert await stage.state("plain", long) == "active"

    gates.clear()
    short, long = [await stage.ours.add("ours", {}, {"jobId": f"job-{n}"}) for n in range(2)]
    task = define_task("ours", ours, options=NO_LIMIT, worker_options=options)
    async with stage.run_ours(task) as running_worker:
        await until(lambda: len(gates) == 2)
        running_worker.stopping.set()
        gates[short.id].set()
        await db.until_status(short.id, "completed")
        for _ in range(3):
            await until_renewed(stage.redis, stage.key("ours", f"{long.id}:lock"))
        gates[long.id].set()
        assert await running_worker.stop() == 0
    assert await stage.state("ours", long) == "completed"


async def test_03_a_job_that_comes_while_closing_is_not_dropped(stage: Stage) -> None:
    stage.gate.clear()
    async with Proxy(stage.redis_url) as proxy:
        async with stage.run_plain(url=proxy.url) as worker:
            await until_idle(stage.redis, stage.plain_name)
            move_to_active = worker.scripts.commands["moveToActive"].sha.encode()
            fetch = proxy.hold_reply_to(move_to_active)
            job = await stage.plain.add("plain", {})
            await fetch.sprung.wait()
            closing = asyncio.create_task(worker.close())
            await until(lambda: worker.closing)
            fetch.release()
            await asyncio.wait({closing}, timeout=PATIENCE)
            # It calls itself closed, and only then starts the job.
            assert worker.closed
            assert stage.ended == []
        assert await stage.state("plain", job) == "active"

    stage.next_act()
    async with Proxy(stage.redis_url) as proxy:
        task = define_task("ours", stage.our_handler)
        async with stage.run_ours(task, url=proxy.url) as running_worker:
            await until_idle(stage.redis, stage.our_name)
            fetch = proxy.hold_reply_to(sha_of("moveToActive"))
            job = await stage.ours.add("ours", {})
            await fetch.sprung.wait()
            running_worker.stopping.set()
            await until(lambda: running_worker.service.workers[0].is_stopping)
            fetch.release()
            assert await running_worker.stop() == 0
    assert stage.begun == []
    assert await stage.state("ours", job) in ("wait", "delayed")
    assert await stage.is_missing(stage.key("ours", f"{job.id}:lock"))
    assert await stage.redis.hget(stage.key("ours", job.id), "atm") in (None, "0")


async def test_04_closing_has_a_deadline(stage: Stage) -> None:
    stage.gate.clear()
    await stage.plain.add("plain", {})
    async with stage.run_plain() as worker:
        await until(lambda: stage.begun)
        closing = asyncio.create_task(asyncio.wait_for(worker.close(), 0.05))
        # Many times its time limit, and it would wait for ever.
        await asyncio.wait({closing}, timeout=1)
        assert not closing.done()
        stage.gate.set()
        await asyncio.wait({closing})
        assert isinstance(closing.exception(), TimeoutError)

    stage.next_act()
    stage.gate.clear()
    job = await stage.ours.add("ours", {})
    task = define_task("ours", stage.our_handler, options=NO_LIMIT)
    async with stage.run_ours(task, worker_shutdown_grace=0.05) as running_worker:
        await until(lambda: stage.begun)
        assert await running_worker.stop() == 4
    assert await stage.state("ours", job) in ("wait", "delayed")


async def test_15_closing_one_queue_leaves_the_shared_client_open(
    stage: Stage, db: Database
) -> None:
    client = PipelinedRedis(stage.redis_url)
    await client.open(PATIENCE)
    worker = Worker("plain", None, {"connection": client, "prefix": stage.prefix})
    assert await client.ping()
    await worker.close()
    with pytest.raises(RedisConnectionError):
        await client.ping()

    client = PipelinedRedis(stage.redis_url)
    recorder = StatusRecorder(stage.database_url)
    await client.open(PATIENCE)
    await recorder.open(PATIENCE)
    workers = []
    for name in ("another", "ours"):
        queue = JobQueue(name, client, stage.prefix, {})
        await queue.open(PATIENCE)
        task = define_task(name, stage.our_handler)
        workers.append(TaskWorker(task, queue, recorder, concurrency=1))
        workers[-1].start()
    assert await workers[0].close(PATIENCE) == 0
    job = await stage.ours.add("ours", {}, {"jobId": "our-job"})
    await db.until_status(job.id, "completed")
    assert client.is_connected
    await workers[1].close(PATIENCE)
    await recorder.close(PATIENCE)
    await client.aclose()


async def test_17_a_marker_that_is_taken_while_closing_is_put_back(stage: Stage) -> None:
    async with Proxy(stage.redis_url) as proxy:
        wait = proxy.hold_reply_to(b"BZPOPMIN")
        async with stage.run_plain(url=proxy.url) as worker:
            await until_idle(stage.redis, stage.plain_name)
            job = await stage.plain.add("plain", {})
            await wait.sprung.wait()
            await asyncio.wait({asyncio.create_task(worker.close())}, timeout=PATIENCE)
    # A job waits, and nothing would tell another worker that sleeps.
    assert await stage.state("plain", job) == "wait"
    assert await stage.is_missing(stage.key("plain", "marker"))

    async with Proxy(stage.redis_url) as proxy:
        # Its seconds, as BZPOPMIN is tried at the start, too.
        wait = proxy.hold_reply_to(b"10.0")
        task = define_task("ours", stage.our_handler)
        async with stage.run_ours(task, url=proxy.url) as running_worker:
            await until_idle(stage.redis, stage.our_name)
            job = await stage.ours.add("ours", {})
            await wait.sprung.wait()
            # It asks the server to end the read, which has ended already.
            before = unblocks(proxy)
            running_worker.stopping.set()
            await until(lambda: unblocks(proxy) > before)
            wait.release()
            assert await running_worker.stop() == 0
    assert stage.ended == []
    assert await stage.state("ours", job) == "wait"
    assert not await stage.is_missing(stage.key("ours", "marker"))


def unblocks(proxy: Proxy) -> int:
    return sum(command[:2] == [b"CLIENT", b"UNBLOCK"] for command in proxy.commands)
