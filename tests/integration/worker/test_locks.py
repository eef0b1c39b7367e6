"""Locks: who runs a job keeps it, however long it takes; who lost it has no say any more."""

import asyncio
import signal
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from tests.support.api import Api
from tests.support.database import Database
from tests.support.plain import producer
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.proxy import Proxy
from tests.support.running import RunWorker, running
from tests.support.scripts import load_scripts, sha_of
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "q"
# A process that stands still may hold the marker that says that there is work; the drain delay is
# how long it takes others to look without one.
SOON: Any = {"lockDuration": 2000, "stalledInterval": 300, "drainDelay": 0.2}


class Handler:
    """A handler of the test's own process; each job waits for the gate.

    Attributes:
        ran: how often each job was started.
    """

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.ran: Counter[str] = Counter()

    async def __call__(self, payload: object, ctx: TaskContext) -> str:
        self.ran[ctx.task_id] += 1
        await self.gate.wait()
        return "done by the test"

    def task(self, queue: str = QUEUE, options: Any = SOON) -> TaskDefinition[Any]:
        own = TaskOptions(concurrency=10, timeout_ms=None)
        return define_task(queue, self, own, worker_options=options)


# -- long jobs -----------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_long_job_is_never_taken_for_stalled(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """Of two workers, each looks for stalled jobs; one of them drains all the while."""
    handler = Handler()
    options: Any = {"lockDuration": 2000, "stalledInterval": 100}
    with capture_logs() as logs:
        async with run_worker([handler.task(options=options)]) as draining:
            drained = await api.schedule(QUEUE)
            await until(lambda: handler.ran[drained])
            draining.stopping.set()
            async with run_worker([handler.task(options=options)]):
                kept = await api.schedule(QUEUE)
                await until(lambda: handler.ran[kept])
                over = time.monotonic() + 3 * 2
                await until(lambda: time.monotonic() > over)
                assert draining.exit_code is None
                handler.gate.set()
                for task_id in (drained, kept):
                    await api.until_both_say(QUEUE, task_id, "completed")
            assert await draining.stop() == 0
    assert handler.ran == {drained: 1, kept: 1}
    assert not {"job_stalled", "job_lost"} & {entry["event"] for entry in logs}
    for task_id in (drained, kept):
        assert await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "stc") is None


# -- lost locks ----------------------------------------------------------------------------------

# What a job does in the worker process is in its payload. It says through files where it is, and is
# told through them to go on.
TASKS = f"""
    import asyncio
    import time
    from pathlib import Path
    from autoflow_worker import DelayedError, TaskOptions, define_task

    async def handler(payload, ctx):
        Path("started-" + ctx.task_id).touch()
        while payload.get("blocks") and not Path("go-on").exists():
            time.sleep(0.01)  # blocks the event loop, and so the renewal of locks
        while not Path("go-on").exists():
            await asyncio.sleep(0.01)
        if payload.get("raises"):
            raise ValueError("raised by the process")
        if payload.get("moves"):
            await ctx.job.moveToDelayed(int(time.time() * 1000) + 60_000, ctx.job.token)
            raise DelayedError
        return "done by the process"

    options = TaskOptions(concurrency=10, timeout_ms=None)
    tasks = [define_task("{QUEUE}", handler, options, worker_options={SOON})]
"""

ENDS: dict[str, dict[str, bool]] = {
    "returns": {},
    "raises": {"raises": True},
    "moves": {"moves": True},
}


async def all_run_in(
    worker: WorkerProcess, api: Api, folder: Path, payloads: dict[str, dict[str, bool]]
) -> None:
    """Schedule these jobs, by id, and wait until each of them runs in this process."""
    await worker.until_logged("worker_started")
    for task_id, payload in payloads.items():
        await api.schedule(QUEUE, payload, task_id=task_id, attempts=3)
        await until(partial((folder / f"started-{task_id}").exists))


async def taken_over(db: Database, handler: Handler, ids: list[str]) -> dict[str, Any]:
    """Wait until these jobs run here; their rows then."""
    await until(lambda: all(handler.ran[task_id] for task_id in ids))
    rows = await db.rows()
    assert {rows[task_id]["status"] for task_id in ids} == {"active"}
    return rows


async def until_lost(worker: WorkerProcess, ids: list[str]) -> None:
    """Wait until a worker process has said of each of these jobs that it lost it."""

    def lost() -> bool:
        return {entry["task_id"] for entry in worker.logged("job_lost")} == set(ids)

    await until(lost, message=worker.report)


async def check_the_last_word(api: Api, handler: Handler, ids: list[str]) -> None:
    """The attempt of the test's own process is what both stores tell."""
    for task_id in ids:
        row = await api.until_both_say(QUEUE, task_id, "completed")
        assert row["result"]["output"] == "done by the test"
        assert (row["attempts"], row["error"]) == (1, None)
        job = await api.node.get_job(QUEUE, task_id)
        assert job is not None
        assert job["returnvalue"] == row["result"]
        assert (job["attemptsMade"], job.get("failedReason")) == (1, None)
        assert handler.ran[task_id] == 1


async def test_a_loop_that_was_blocked_past_its_locks_has_no_say(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter, tmp_path: Path
) -> None:
    worker, handler = worker_process(TASKS), Handler()
    payloads = ENDS | {"blocks": {"blocks": True}}
    await all_run_in(worker, api, tmp_path, payloads)
    async with run_worker([handler.task()]):
        before = await taken_over(api.db, handler, [*payloads])
        (tmp_path / "go-on").touch()
        await until_lost(worker, [*payloads])
        # Whoever runs them now is not disturbed.
        assert await api.db.rows() == before
        assert await api.node.get_counts(QUEUE) | {"active": 4, "delayed": 0} == (
            await api.node.get_counts(QUEUE)
        )
        handler.gate.set()
        await check_the_last_word(api, handler, [*payloads])
    # And the one that lost them works on.
    after = await api.schedule(QUEUE)
    row = await api.until_both_say(QUEUE, after, "completed")
    assert row["result"]["output"] == "done by the process"
    worker.terminate()
    assert await worker.wait() == 0


async def test_a_process_that_stood_still_past_its_locks_has_no_say(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter, tmp_path: Path
) -> None:
    worker, handler = worker_process(TASKS), Handler()
    early = {f"early-{name}": payload for name, payload in ENDS.items()}
    late = {f"late-{name}": payload for name, payload in ENDS.items()}
    await all_run_in(worker, api, tmp_path, early)
    worker.send(signal.SIGSTOP)
    async with run_worker([handler.task()]):
        await taken_over(api.db, handler, [*early])
        handler.gate.set()
        await check_the_last_word(api, handler, [*early])
        ended = await api.db.rows()
        (tmp_path / "go-on").touch()
        worker.send(signal.SIGCONT)
        await until_lost(worker, [*early])
        assert await api.db.rows() == ended
    (tmp_path / "go-on").unlink()
    handler = Handler()
    await all_run_in(worker, api, tmp_path, late)
    worker.send(signal.SIGSTOP)
    async with run_worker([handler.task()]):
        before = await taken_over(api.db, handler, [*late])
        (tmp_path / "go-on").touch()
        worker.send(signal.SIGCONT)
        await until_lost(worker, [*early, *late])
        assert await api.db.rows() == before
        handler.gate.set()
        await check_the_last_word(api, handler, [*late])
    worker.terminate()
    assert await worker.wait() == 0


async def test_a_process_that_stood_still_while_nobody_took_its_jobs_finishes_them(
    api: Api, worker_process: WorkerStarter, tmp_path: Path, redis: Redis, prefix: str
) -> None:
    worker, base = worker_process(TASKS), f"{prefix}:{QUEUE}:"
    payloads: dict[str, dict[str, bool]] = {"one": {}, "two": {}}
    await all_run_in(worker, api, tmp_path, payloads)
    worker.send(signal.SIGSTOP)

    async def expired() -> bool:
        return not await redis.exists(*(f"{base}{task_id}:lock" for task_id in payloads))

    await until(expired)
    # Its own check would be the first to find them stalled.
    await redis.sadd(f"{base}stalled", *payloads)
    await redis.delete(f"{base}stalled-check")
    worker.send(signal.SIGCONT)

    async def renewed() -> bool:
        locks = [f"{base}{task_id}:lock" for task_id in payloads]
        return await redis.exists(*locks) == len(locks)

    await until(renewed)
    (tmp_path / "go-on").touch()
    for task_id in payloads:
        row = await api.until_both_say(QUEUE, task_id, "completed")
        assert row["result"]["output"] == "done by the process"
        assert await redis.hget(f"{base}{task_id}", "ats") == "1"
        assert await redis.hget(f"{base}{task_id}", "stc") is None
    worker.terminate()
    assert await worker.wait() == 0
    assert worker.logged("job_lost") == worker.logged("job_stalled") == []


async def test_a_worker_that_stood_still_between_renewing_and_looking_renews_again(
    api: Api, redis_url: str, redis: Redis, database_url: str, prefix: str
) -> None:
    """Renewed long ago, its own jobs would be the first that it finds stalled."""
    handler, base = Handler(), f"{prefix}:{QUEUE}:"
    task = handler.task(options={"lockDuration": 1000, "stalledInterval": 300})
    await load_scripts(redis)  # so that no reply says that one is unknown
    async with (
        Proxy(redis_url) as proxy,
        running([task], redis_url=proxy.url, database_url=database_url, prefix=prefix),
    ):
        task_id = await api.schedule(QUEUE)
        await until(lambda: handler.ran[task_id])
        renewal = proxy.hold_reply_to(sha_of("extendLocks"))
        await renewal.sprung.wait()

        async def is_locked() -> bool:
            return bool(await redis.exists(f"{base}{task_id}:lock"))

        async def expired() -> bool:
            return not await is_locked()

        await until(expired)
        await redis.sadd(f"{base}stalled", task_id)
        await redis.delete(f"{base}stalled-check")
        renewal.release()
        await until(is_locked)
        handler.gate.set()
        await api.until_both_say(QUEUE, task_id, "completed")
    assert handler.ran == {task_id: 1}
    assert await redis.hget(f"{base}{task_id}", "stc") is None


@pytest.mark.parametrize("outcome", ["returns", "raises"])
async def test_a_job_that_ended_while_redis_was_away_longer_than_its_lock_is_not_run_again(
    own_redis: OwnServer, database_url: str, db: Database, prefix: str, outcome: str
) -> None:
    """The lock has expired, but nobody has claimed the job since: it is taken again."""
    ran: list[str] = []
    ended, go_on = asyncio.Event(), asyncio.Event()

    async def handler(payload: object, ctx: TaskContext) -> str:
        ran.append(ctx.task_id)
        await go_on.wait()
        ended.set()
        if outcome == "raises":
            raise ValueError("no luck")
        return "done"

    options: Any = {"lockDuration": 2000, "stalledInterval": 300}
    task = define_task(QUEUE, handler, worker_options=options)
    status = {"returns": "completed", "raises": "failed"}[outcome]
    async with running([task], redis_url=own_redis.url, database_url=database_url, prefix=prefix):
        async with producer(QUEUE, own_redis.url, prefix) as queue:
            await queue.add(QUEUE, {}, {"jobId": "the-job", "attempts": 1})
            await db.until_status("the-job", "active")
        await own_redis.kill()
        go_on.set()
        await ended.wait()
        over = time.monotonic() + 2.5
        await until(lambda: time.monotonic() > over)
        await own_redis.start()
        await db.until_status("the-job", status)
        async with Redis.from_url(own_redis.url, decode_responses=True) as redis:

            async def finished() -> bool:
                return await redis.zscore(f"{prefix}:{QUEUE}:{status}", "the-job") is not None

            await until(finished)
            assert await redis.hget(f"{prefix}:{QUEUE}:the-job", "atm") == "1"
    assert ran == ["the-job"]
