"""The traps of bullmq 3.4's own `Worker` (docs/internals.md lists them): each of them is shut.

Where it can be shown, a test first runs the official Worker into the trap, on the queue `plain`,
and then this worker past it, on the queue `ours`.
"""

import asyncio
import base64
import datetime as dt
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from bullmq import Job, Queue, Worker
from bullmq.backoffs import Backoffs
from redis.asyncio import Redis
from redis.exceptions import ConnectionError as RedisConnectionError
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.broker.backoff import NoBackoffError, backoff_ms
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.worker.task_worker import TaskWorker
from tests.support.database import Database
from tests.support.node import FOLDER, NODE, Node
from tests.support.plain import (
    Handler,
    blocked,
    clients,
    plain_worker,
    producer,
    state,
    until_idle,
    until_renewed,
)
from tests.support.process import WorkerStarter
from tests.support.proxy import Proxy
from tests.support.running import Running, running
from tests.support.scripts import sha_of
from tests.support.servers import OwnServer
from tests.support.until import PATIENCE, until

Payload = dict[str, Any]
NO_LIMIT = TaskOptions(timeout_ms=None, concurrency=2)


@dataclass
class Stage:
    """Both workers, their queues, and what their handlers do.

    Attributes:
        plain, ours: the producers.
        begun: ids of the jobs whose handlers were started, in order.
        ended: ids of the jobs whose handlers have ended.
        gate: handlers wait for it; open as it comes.
    """

    redis: Redis
    redis_url: str
    database_url: str
    prefix: str
    plain: Queue
    ours: Queue
    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def plain_handler(self, job: Job, token: str) -> str:
        return await self._run(job.id)

    async def our_handler(self, payload: Payload, ctx: TaskContext) -> str:
        return await self._run(ctx.task_id)

    async def _run(self, job_id: str) -> str:
        self.begun.append(job_id)
        await self.gate.wait()
        self.ended.append(job_id)
        return "done"

    def next_act(self) -> None:
        """Forget what the handlers of the first worker did."""
        self.begun.clear()
        self.ended.clear()

    def run_plain(
        self, handler: Handler | None = None, *, url: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Worker]:
        return plain_worker(
            "plain", handler or self.plain_handler, url or self.redis_url, self.prefix, **options
        )

    def run_ours(
        self, task: TaskDefinition[Any], *, url: str | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[Running]:
        return running(
            [task],
            redis_url=url or self.redis_url,
            database_url=self.database_url,
            prefix=self.prefix,
            **settings,
        )

    @property
    def our_name(self) -> str:
        """What our connection for the queue is called: as Node expects it."""
        return f"{self.prefix}:{base64.b64encode(b'ours').decode()}"

    @property
    def plain_name(self) -> str:
        return f"{self.prefix}:plain"

    def key(self, queue: str, name: str) -> str:
        return f"{self.prefix}:{queue}:{name}"

    async def state(self, queue: str, job: Job) -> str:
        return await state(self.redis, self.prefix, queue, job.id)

    async def is_missing(self, key: str) -> bool:
        return not await self.redis.exists(key)


@pytest.fixture
async def stage(
    redis: Redis, redis_url: str, database_url: str, prefix: str
) -> AsyncIterator[Stage]:
    async with (
        producer("plain", redis_url, prefix) as plain,
        producer("ours", redis_url, prefix) as ours,
    ):
        stage = Stage(redis, redis_url, database_url, prefix, plain, ours)
        stage.gate.set()
        yield stage


async def test_01_an_idle_read_is_not_taken_for_a_dead_connection(stage: Stage) -> None:
    # The trap is a read timeout no longer than the blocking read: 5 s both, here less of both.
    url = f"{stage.redis_url}?socket_timeout=0.3"
    async with stage.run_plain(url=url, drainDelay=1):
        await until_idle(stage.redis, stage.plain_name)
        # It hangs up on a server that is well, and sleeps for seconds before it listens again.
        await until(partial(nobody_listens, stage))

    task = define_task("ours", stage.our_handler, worker_options={"drainDelay": 0.3})
    async with stage.run_ours(task, url=url):
        first = await until_idle(stage.redis, stage.our_name)

        async def has_read_twice_more() -> bool:
            [now] = await clients(stage.redis, stage.our_name)
            return int(now["tot-cmds"]) >= int(first["tot-cmds"]) + 2

        await until(has_read_twice_more)
        assert [c["id"] for c in await clients(stage.redis, stage.our_name)] == [first["id"]]
        await stage.ours.add("ours", {})
        await until(lambda: stage.ended)


async def nobody_listens(stage: Stage) -> bool:
    return not await blocked(stage.redis, stage.plain_name)


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


async def test_05_a_handler_that_cancels_itself_fails_its_job_alone(
    stage: Stage, db: Database
) -> None:
    async def plain(job: Job, token: str) -> None:
        raise asyncio.CancelledError

    async def ours(payload: Payload, ctx: TaskContext) -> None:
        if payload["cancels"]:
            raise asyncio.CancelledError

    await stage.plain.add("plain", {})
    async with stage.run_plain(plain) as worker:
        # The whole worker ends, and nobody is told.
        await asyncio.wait({worker.task}, timeout=PATIENCE)
        assert worker.task.cancelled()
        assert worker.errors == []

    first = await stage.ours.add("ours", {"cancels": True}, {"jobId": "cancels", "attempts": 1})
    second = await stage.ours.add("ours", {"cancels": False}, {"jobId": "does-not"})
    async with stage.run_ours(define_task("ours", ours)):
        failed = await db.until_status(first.id, "failed")
        await db.until_status(second.id, "completed")
    assert failed.error is not None
    assert "cancelled" in failed.error.reason
    assert await stage.state("ours", first) == "failed"


async def test_06_no_listener_has_a_say_in_what_becomes_of_a_job(
    stage: Stage, db: Database
) -> None:
    def raising(*_: object) -> int:
        raise RuntimeError("a listener's bug")

    async with stage.run_plain() as worker:
        worker.on("active", raising)
        job = await stage.plain.add("plain", {})
        await until(lambda: worker.errors)
        # The job was fetched, and is forgotten.
        assert stage.begun == []
        assert await stage.state("plain", job) == "active"

    # Nothing listens here. Of the functions that a task may pass in, one raises.
    async def fails(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError("no luck")

    options: Any = {"settings": {"backoffStrategy": raising}}
    task = define_task("ours", fails, worker_options=options)
    own = {"attempts": 3, "backoff": {"type": "own"}}
    built_in = {"attempts": 2, "backoff": {"type": "fixed", "delay": 300_000}}
    first = await stage.ours.add("ours", {}, {"jobId": "own", **own})
    second = await stage.ours.add("ours", {}, {"jobId": "built-in", **built_in})
    async with stage.run_ours(task):
        failed = await db.until_status(first.id, "failed")
        # `failed` is said only of what is final.
        delayed = await db.until_status(second.id, "delayed")
    assert failed.error is not None
    assert failed.error.reason.startswith("no luck")
    assert (delayed.attempts, delayed.failedAt) == (1, None)


async def test_07_a_job_costs_one_round_trip(own_redis: OwnServer, stage: Stage) -> None:
    jobs, url, prefix = 40, own_redis.url, stage.prefix
    async with Redis.from_url(url, decode_responses=True) as redis:
        async with producer("plain", url, prefix) as queue:
            await queue.addBulk([{"name": "plain", "data": {}} for _ in range(jobs)])
        await redis.config_resetstat()
        async with stage.run_plain(url=url):
            await until(partial(holds, redis, stage.key("plain", "completed"), jobs))
        plain = await scripts_run(redis)

        async with producer("ours", url, prefix) as queue:
            await queue.addBulk([{"name": "ours", "data": {}} for _ in range(jobs)])
        await redis.config_resetstat()
        task = define_task("ours", stage.our_handler, worker_options={"stalledInterval": 60_000})
        async with stage.run_ours(task, url=url):
            await until(partial(holds, redis, stage.key("ours", "completed"), jobs))
        ours = await scripts_run(redis)
    assert plain >= 2 * jobs
    assert jobs <= ours <= jobs + 12


async def holds(redis: Redis, key: str, count: int) -> bool:
    cards: int = await redis.zcard(key)
    return cards == count


async def scripts_run(redis: Redis) -> int:
    stats = await redis.info("commandstats")
    calls: int = stats["cmdstat_evalsha"]["calls"]
    return calls


async def test_08_delays_are_waited_for_to_the_millisecond(stage: Stage) -> None:
    delay = 1100
    async with Proxy(stage.redis_url) as proxy, stage.run_plain(url=proxy.url, drainDelay=60):
        await until_idle(stage.redis, stage.plain_name)
        await stage.plain.add("plain", {}, {"delay": delay})
        await until(lambda: stage.ended)
        waits = [command[2] for command in proxy.commands if command[0] == b"BZPOPMIN"]
    assert all(seconds.isdigit() for seconds in waits)  # whole seconds
    assert len(waits) > 1

    stage.next_act()
    task = define_task("ours", stage.our_handler, worker_options={"drainDelay": 60})
    async with Proxy(stage.redis_url) as proxy, stage.run_ours(task, url=proxy.url):
        await until_idle(stage.redis, stage.our_name)
        job = await stage.ours.add("ours", {}, {"jobId": "our-job", "delay": delay})
        await until(lambda: stage.ended)
        # Its own clock ends the wait.
        assert any(b"UNBLOCK" in command for command in proxy.commands)
    assert await started_at(stage, "ours", job) >= job.timestamp + delay


async def started_at(stage: Stage, queue: str, job: Job) -> int:
    return int(await stage.redis.hget(stage.key(queue, job.id), "processedOn") or 0)


async def test_09_the_next_job_starts_when_the_rate_limit_ends(stage: Stage) -> None:
    duration = 200
    options: Any = {"limiter": {"max": 1, "duration": duration}, "drainDelay": 60}

    async def oversleeps() -> bool:
        """Whether the limit has ended, jobs wait, and the worker does so too."""
        limited = not await stage.is_missing(stage.key("plain", "limiter"))
        waiting = await stage.redis.llen(stage.key("plain", "wait"))
        return not limited and waiting > 0 and bool(await blocked(stage.redis, stage.plain_name))

    for _ in range(3):
        await stage.plain.add("plain", {})
    async with stage.run_plain(**options):
        await until(lambda: stage.ended)
        await until(oversleeps)

    stage.next_act()
    jobs = [await stage.ours.add("ours", {}, {"jobId": f"job-{n}"}) for n in range(3)]
    task = define_task("ours", stage.our_handler, worker_options=options)
    async with stage.run_ours(task):
        await until(lambda: len(stage.ended) == 3)
    began = [await started_at(stage, "ours", job) for job in jobs]
    gaps = [later - earlier for earlier, later in itertools.pairwise(began)]
    assert all(duration - 2 <= gap for gap in gaps)


async def test_10_stalled_jobs_are_looked_for_at_once(stage: Stage) -> None:
    for name, queue in (("plain", stage.plain), ("ours", stage.ours)):
        await queue.add(name, {}, {"jobId": f"{name}-job"})
        # A worker claims it, looks for stalled jobs, and dies.
        options = {"lockDuration": 50, "stalledInterval": 50}
        client = Redis.from_url(stage.redis_url, decode_responses=True)
        dead = Worker(name, None, {"connection": client, "prefix": stage.prefix, **options})
        assert await dead.getNextJob("the dead one's token") is not None
        await dead.runStalledJobsCheck()
        await dead.close()
        await until(partial(stage.is_missing, stage.key(name, f"{name}-job:lock")))
        await until(partial(stage.is_missing, stage.key(name, "stalled-check")))

    async with stage.run_plain(stalledInterval=600_000):
        await until_idle(stage.redis, stage.plain_name)
        # Nobody would look at it for ten minutes.
        assert await stage.is_missing(stage.key("plain", "stalled-check"))
        assert await state(stage.redis, stage.prefix, "plain", "plain-job") == "active"

    task = define_task("ours", stage.our_handler, worker_options={"stalledInterval": 600_000})
    async with stage.run_ours(task):
        await until(lambda: stage.ended == ["ours-job"])


async def test_11_work_is_not_repeated_for_its_return_value(stage: Stage, db: Database) -> None:
    ran: list[str] = []

    async def plain(job: Job, token: str) -> object:
        ran.append(job.id)
        return {1}

    async def ours(payload: Payload, ctx: TaskContext) -> object:
        ran.append(ctx.task_id)
        circle: list[object] = []
        circle.append(circle)
        noon = dt.datetime(2026, 1, 2, 12, tzinfo=dt.UTC)
        return circle if payload["circular"] else [{1}, float("nan"), noon, b"bytes"]

    twice = {"attempts": 2}
    await stage.plain.add("plain", {}, twice)
    async with stage.run_plain(plain):
        await until(lambda: len(ran) == 2)

    ran.clear()
    first = await stage.ours.add("ours", {"circular": False}, {"jobId": "odd", **twice})
    second = await stage.ours.add("ours", {"circular": True}, {"jobId": "circular", **twice})
    async with stage.run_ours(define_task("ours", ours)):
        completed = await db.until_status(first.id, "completed")
        failed = await db.until_status(second.id, "failed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))
    assert ran == [first.id, second.id]
    assert completed.result is not None
    assert completed.result.output[:3] == [[1], None, "2026-01-02T12:00:00Z"]
    assert failed.error is not None


async def test_12_an_acknowledgement_is_not_sent_again_blindly(stage: Stage, db: Database) -> None:
    async with Proxy(stage.redis_url) as proxy, stage.run_plain(url=proxy.url) as worker:
        move_to_finished = worker.scripts.commands["moveToFinished"].sha.encode()
        lost = proxy.lose_reply_to(move_to_finished)
        job = await stage.plain.add("plain", {})
        await until(lambda: worker.errors)
        # It was done the first time, and is said to have gone wrong.
        assert "Missing lock" in worker.errors[0]
        assert lost.count > 1
        assert await stage.state("plain", job) == "completed"

    async with Proxy(stage.redis_url) as proxy:
        task = define_task("ours", stage.our_handler)
        with capture_logs() as log:
            async with stage.run_ours(task, url=proxy.url):
                lost = proxy.lose_reply_to(sha_of("moveToFinished"))
                job = await stage.ours.add("ours", {}, {"jobId": "our-job"})
                await lost.sprung.wait()
                await until_idle(stage.redis, stage.our_name)
            assert lost.count == 1
    assert await stage.state("ours", job) == "completed"
    assert (await db.task(job.id)).status == "completed"
    assert stage.ended.count(job.id) == 1
    assert not {"job_lost", "attempt_broken"} & {entry["event"] for entry in log}


@pytest.mark.parametrize(
    ("name", "value"),
    [("data", "{"), ("opts", "[]"), ("opts", "x"), ("atm", "x"), ("ats", "x"), ("priority", "x")],
)
async def test_13_a_job_that_can_not_be_parsed_fails(
    stage: Stage, db: Database, name: str, value: str
) -> None:
    for queue in (stage.plain, stage.ours):
        job = await queue.add(queue.name, {}, {"jobId": "the-job"})
        await stage.redis.hset(stage.key(queue.name, job.id), name, value)
    async with stage.run_plain() as worker:
        await until(lambda: worker.errors)
        # It is claimed, and nobody's.
        assert await stage.state("plain", job) == "active"
        assert stage.begun == []

    other = await stage.ours.add("ours", {}, {"jobId": "the-next"})
    async with stage.run_ours(define_task("ours", stage.our_handler)):
        await db.until_status(job.id, "failed")
        await db.until_status(other.id, "completed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))
    failed = await db.task(job.id)
    assert failed.error is not None
    told = await stage.redis.hget(stage.key("ours", job.id), "failedReason")
    assert failed.error.reason == told
    assert stage.begun == [other.id]


async def test_13_a_job_that_is_no_hash_fails(stage: Stage, db: Database) -> None:
    job = await stage.ours.add("ours", {}, {"jobId": "the-job"})
    other = await stage.ours.add("ours", {}, {"jobId": "the-next"})
    await stage.redis.set(stage.key("ours", job.id), "a string")
    async with stage.run_ours(define_task("ours", stage.our_handler)):
        await db.until_status(job.id, "failed")
        await db.until_status(other.id, "completed")
        await until(partial(holds, stage.redis, stage.key("ours", "failed"), 1))


async def test_14_backoffs_are_as_nodes(stage: Stage, db: Database) -> None:
    async def plain(job: Job, token: str) -> None:
        raise ValueError("no luck")

    async def ours(payload: Payload, ctx: TaskContext) -> None:
        raise ValueError("no luck")

    half = {"type": "fixed", "delay": 1000, "jitter": 0.5}
    assert {await Backoffs.calculate(half, 1, None, None, None) for _ in range(50)} == {1000}
    unknown = {"attempts": 2, "backoff": {"type": "unknown"}}
    job = await stage.plain.add("plain", {}, {"jobId": "unknown", **unknown})
    async with stage.run_plain(plain) as worker:
        await until(lambda: worker.errors)
        assert await stage.state("plain", job) == "active"

    job = await stage.ours.add("ours", {}, {"jobId": "unknown", **unknown})
    none = await stage.ours.add("ours", {}, {"jobId": "no-attempts"})
    await stage.redis.hset(stage.key("ours", none.id), "opts", "{}")
    async with stage.run_ours(define_task("ours", ours)):
        failed = [await db.until_status(each.id, "failed") for each in (job, none)]
    assert [row.attempts for row in failed] == [1, 1]
    assert failed[0].error is not None
    assert "unknown" in failed[0].error.reason

    cases: list[Any] = [
        [{"type": kind, "delay": delay, "jitter": jitter}, attempt]
        for kind in ("fixed", "exponential")
        for delay in (0, 1, 999, 1000.5)
        for jitter in (0, 0.1, 0.5, 1)
        for attempt in (1, 2, 3, 10)
    ]
    for (backoff, attempt), (low, high) in zip(cases, await nodes_backoffs(cases), strict=True):
        drawn = [await backoff_ms(backoff, attempt) for _ in range(20)]
        assert all(low - 1 < delay <= high for delay in drawn if delay is not None), (
            f"{backoff}, attempt {attempt}: {drawn}, but Node's are {low} to {high}"
        )
    with pytest.raises(NoBackoffError):
        await backoff_ms({"type": "unknown"}, 1)


async def nodes_backoffs(cases: list[Any]) -> list[tuple[float, float]]:
    """The shortest and the longest wait that Node could choose in each case."""
    backoffs = FOLDER / "node_modules/bullmq5/dist/cjs/classes/backoffs.js"
    script = f"""
        const {{ Backoffs }} = require({json.dumps(str(backoffs))});
        const draw = (number, [backoff, attempt]) => {{
            Math.random = () => number;
            return Backoffs.calculate(backoff, attempt);
        }};
        const cases = {json.dumps(cases)};
        console.log(JSON.stringify(cases.map((c) => [draw(0, c), draw(1, c)])));
    """
    node = await asyncio.create_subprocess_exec(NODE, "-e", script, stdout=-1)
    output, _ = await node.communicate()
    result: list[tuple[float, float]] = json.loads(output)
    return result


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


async def test_16_nodes_get_workers_sees_the_workers(stage: Stage, node: Node) -> None:
    async with stage.run_plain(), stage.run_plain(name="named"):
        await until_idle(stage.redis, stage.plain_name)
        await until_idle(stage.redis, f"{stage.plain_name}:w:named")
        assert await node.get_workers("plain") == []

    unnamed = define_task("ours", stage.our_handler)
    named = define_task("ours", stage.our_handler, worker_options={"name": "the-first"})
    async with stage.run_ours(unnamed), stage.run_ours(named):
        seen = await node.get_workers("ours")
        # One connection each, though each worker has two.
        assert len(seen) == 2
        assert {worker["rawname"] for worker in seen} == {
            stage.our_name,
            f"{stage.our_name}:w:the-first",
        }
        assert {worker["name"] for worker in seen} == {"ours"}
    assert await node.get_workers("ours") == []


def unblocks(command: list[bytes]) -> bool:
    """Whether this ends a blocking read; the start tries the command on connection 0."""
    return command[:2] == [b"CLIENT", b"UNBLOCK"] and command[2] != b"0"


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
        wait = proxy.hold_reply_to(b"12.5")
        task = define_task("ours", stage.our_handler)
        async with stage.run_ours(task, url=proxy.url) as running_worker:
            await until_idle(stage.redis, stage.our_name)
            job = await stage.ours.add("ours", {})
            await wait.sprung.wait()
            running_worker.stopping.set()
            # It asks the server to end the read, which has ended already.
            await until(lambda: any(map(unblocks, proxy.commands)))
            wait.release()
            assert await running_worker.stop() == 0
    assert stage.ended == []
    assert await stage.state("ours", job) == "wait"
    assert not await stage.is_missing(stage.key("ours", "marker"))


# The official Worker records nothing, so all that it would show here is an error.
TASKS_18 = """
    import time
    from pathlib import Path
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        try:
            Path("first").touch(exist_ok=False)
        except FileExistsError:
            return "second"
        while not Path("go-on").exists():
            time.sleep(0.01)  # blocks the event loop, and so the renewal of locks
        return "first"

    tasks = [
        define_task("ours", handler, worker_options={"lockDuration": 1000, "stalledInterval": 400})
    ]
"""


async def test_18_an_attempt_whose_lock_was_lost_has_no_say(
    stage: Stage, worker_process: WorkerStarter, db: Database, tmp_path: Path
) -> None:
    workers = [worker_process(TASKS_18) for _ in range(2)]
    for worker in workers:
        await worker.until_logged("worker_started")
    job = await stage.ours.add("ours", {}, {"jobId": "our-job"})
    completed = await db.until_status(job.id, "completed")
    assert completed.result is not None
    assert completed.result.output == "second"
    (tmp_path / "go-on").touch()
    await until(lambda: any(worker.logged("job_lost") for worker in workers))
    for worker in workers:
        worker.terminate()
        assert await worker.wait() == 0
    assert await db.task(job.id) == completed
    kept = json.loads(await stage.redis.hget(stage.key("ours", job.id), "returnvalue") or "")
    assert kept["output"] == "second"
