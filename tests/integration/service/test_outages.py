"""Redis goes away in every way that it can, and the worker goes on as if nothing had been.

Every break comes while some jobs run, some have just ended and some wait. Nothing is lost, and
nothing that was acknowledged is done again.
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil
import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.broker import marker
from autoflow_worker.broker.channel import Channel
from tests.support.configured import ConfiguredRedis
from tests.support.database import Database
from tests.support.plain import producer, state
from tests.support.process import WorkerStarter
from tests.support.proxy import Proxy
from tests.support.running import Running, running
from tests.support.scripts import load_scripts, sha_of
from tests.support.servers import OwnServer
from tests.support.until import until

Payload = dict[str, Any]
QUEUE = "storms"


@dataclass
class Scene:
    """A worker and its producer, which reach Redis through a proxy.

    Attributes:
        server: what is to be broken.
        runs: how often each job's handler was started.
        go_on: handlers of jobs with `held` wait for it.
    """

    server: OwnServer
    other: OwnServer
    proxy: Proxy
    db: Database
    prefix: str
    runs: Counter[str] = field(default_factory=Counter)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    worker_options: Any = field(default_factory=dict)

    async def handler(self, payload: Payload, ctx: TaskContext) -> None:
        self.runs[ctx.task_id] += 1
        if payload.get("held"):
            await self.go_on.wait()
        if ctx.attempt <= payload.get("failures", 0):
            raise ValueError("not yet")

    def work(self, concurrency: int = 3, **settings: Any) -> AbstractAsyncContextManager[Running]:
        options = TaskOptions(concurrency=concurrency, timeout_ms=None)
        task = define_task(QUEUE, self.handler, options=options, worker_options=self.worker_options)
        return running(
            [task],
            redis_url=self.proxy.url,
            database_url=self.db.url,
            prefix=self.prefix,
            **settings,
        )

    async def add(self, *jobs: str, payload: Payload | None = None, **options: Any) -> None:
        async with producer(QUEUE, self.proxy.url, self.prefix) as queue:
            for job in jobs:
                await queue.add(QUEUE, payload or {}, {"jobId": job, **options})

    async def state(self, job: str) -> str:
        async with Redis.from_url(self.proxy.url, decode_responses=True) as redis:
            return await state(redis, self.prefix, QUEUE, job)

    async def until_completed(self, *jobs: str) -> None:
        """Wait until both stores say so."""
        for job in jobs:
            await self.db.until_status(job, "completed")

            async def acknowledged(job: str = job) -> bool:
                return await self.state(job) == "completed"

            await until(acknowledged)

    async def admin(self, *command: Any) -> Any:
        async with Redis.from_url(self.server.url, decode_responses=True) as redis:
            return await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def until_checked(self) -> None:
        """Wait until a worker looks for stalled jobs for the next time.

        The mark that it leaves may be renewed at once, so it says little that it is there.
        """
        mark = f"{self.prefix}:{QUEUE}:stalled-check"
        earlier = await self.admin("PEXPIRETIME", mark)

        async def renewed() -> bool:
            return bool(await self.admin("PEXPIRETIME", mark) > earlier)

        await until(renewed)

    async def load_scripts(self) -> None:
        """So that the first reply to a script is not that the server does not know it."""
        async with Redis.from_url(self.server.url) as redis:
            await load_scripts(redis)


@pytest.fixture
async def scene(
    make_redis: Callable[..., Awaitable[OwnServer]], db: Database, prefix: str
) -> AsyncIterator[Scene]:
    configured, other = OwnServer(ConfiguredRedis()), await make_redis()
    try:
        await configured.start()
        async with Proxy(configured.url) as proxy:
            scene = Scene(configured, other, proxy, db, prefix)
            await scene.load_scripts()
            yield scene
    finally:
        await configured.close()


# -- ways to break ---------------------------------------------------------------------------------

Break = Callable[[Scene], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    await scene.server.kill()
    yield
    await scene.server.start()


@asynccontextmanager
async def stopped(scene: Scene) -> AsyncIterator[None]:
    await scene.server.stop()
    yield
    await scene.server.start()


@asynccontextmanager
async def suspended(scene: Scene) -> AsyncIterator[None]:
    scene.server.suspend()
    yield
    scene.server.resume()


@asynccontextmanager
async def connections_killed(scene: Scene) -> AsyncIterator[None]:
    """Each of the worker's connections by itself, more than once."""
    async with Redis.from_url(scene.server.url, decode_responses=True) as redis:
        me = await redis.client_id()
        for _ in range(2):
            for client in await redis.client_list():
                if client["id"] != str(me):
                    await redis.client_kill_filter(_id=client["id"])
    yield


@asynccontextmanager
async def read_only(scene: Scene) -> AsyncIterator[None]:
    await scene.admin("REPLICAOF", "127.0.0.1", "1")
    yield
    await scene.admin("REPLICAOF", "NO", "ONE")


@asynccontextmanager
async def loading(scene: Scene) -> AsyncIterator[None]:
    assert isinstance(scene.server.server, ConfiguredRedis)
    await scene.server.server.load_slowly()
    await scene.server.kill()
    await scene.server.start()
    yield
    async with Redis.from_url(scene.server.url, retry=None) as redis:

        async def loaded() -> bool:
            return not (await redis.info("persistence"))["loading"]

        await until(loaded)


@asynccontextmanager
async def failed_over(scene: Scene) -> AsyncIterator[None]:
    """Another server has all that this one had, and then its address."""
    async with Redis.from_url(scene.other.url, decode_responses=True) as other:
        await scene.admin("CONFIG", "SET", "repl-diskless-sync-delay", 0)
        await other.replicaof("127.0.0.1", str(scene.server.port))

        async def in_sync() -> bool:
            return bool((await other.info("replication"))["master_link_status"] == "up")

        await until(in_sync)
        assert await scene.admin("WAIT", 1, 5000) == 1
        await scene.server.kill()
        yield
        await other.replicaof("NO", "ONE")
        scene.proxy.redirect(scene.other.port)


WAYS = [killed, stopped, suspended, connections_killed, read_only, loading, failed_over]
ways = pytest.mark.parametrize("broken", WAYS, ids=lambda way: way.__name__)


# -- outages ---------------------------------------------------------------------------------------


@ways
async def test_jobs_run_on_over_an_outage(scene: Scene, broken: Break) -> None:
    with capture_logs() as log:
        async with scene.work():
            await scene.add("before")
            await scene.until_completed("before")
            await scene.add("held-1", "held-2", payload={"held": True})
            await scene.db.until_status("held-2", "active")
            await scene.add("fails", payload={"failures": 1}, attempts=2)
            await scene.db.until_status("fails", "completed")
            await scene.until_completed("fails")
            async with broken(scene):
                # They end now: the rows say so, and BullMQ has to be told later.
                scene.go_on.set()
                for job in ("held-1", "held-2"):
                    await scene.db.until_status(job, "completed")
            await scene.until_completed("held-1", "held-2")
            await scene.add("after-1", "after-2", "after-3")
            await scene.until_completed("after-1", "after-2", "after-3")
    assert scene.runs.pop("fails") == 2
    assert set(scene.runs.values()) == {1}
    # The connections beside the shared one say it at level debug.
    events = Counter(entry["event"] for entry in log if entry["log_level"] != "debug")
    assert events["redis_connection_lost"] <= 1 + (broken is connections_killed)
    assert events["redis_connection_restored"] == events["redis_connection_lost"]
    assert [entry for entry in log if entry["log_level"] == "error"] == []


@ways
async def test_an_idle_worker_wakes_after_an_outage(scene: Scene, broken: Break) -> None:
    async with scene.work():
        await scene.add("before")
        await scene.until_completed("before")
        async with broken(scene):
            pass
        await scene.add("after")
        await scene.until_completed("after")
    assert scene.runs == {"before": 1, "after": 1}


@ways
async def test_a_drain_goes_on_over_an_outage(scene: Scene, broken: Break) -> None:
    await scene.add("held-1", "held-2", "held-3", payload={"held": True})
    await scene.add("left")
    async with scene.work(worker_shutdown_grace=60) as worker:
        await scene.db.until_status("held-3", "active")
        worker.stopping.set()
        async with broken(scene):
            scene.go_on.set()
            for job in ("held-1", "held-2", "held-3"):
                await scene.db.until_status(job, "completed")
        assert await worker.stop() == 0
    assert [await scene.state(f"held-{n}") for n in (1, 2, 3)] == ["completed"] * 3
    assert await scene.state("left") == "wait"
    assert set(scene.runs.values()) == {1}


async def test_a_signal_that_comes_during_an_outage(scene: Scene) -> None:
    await scene.add("held", payload={"held": True})
    async with scene.work(worker_shutdown_grace=60) as worker:
        await scene.db.until_status("held", "active")
        async with killed(scene):
            scene.go_on.set()
            await scene.db.until_status("held", "completed")
            worker.stopping.set()
        assert await worker.stop() == 0
    assert await scene.state("held") == "completed"
    assert scene.runs == {"held": 1}


async def test_what_was_due_during_an_outage(scene: Scene) -> None:
    scene.worker_options = {"drainDelay": 60}
    async with scene.work():
        await scene.add("fails", payload={"failures": 1}, attempts=2, backoff=2500)
        await scene.add("is-delayed", delay=2500)
        await scene.db.until_status("fails", "delayed")
        async with killed(scene):
            await pass_time(2.6)
        await scene.until_completed("fails", "is-delayed")
    assert scene.runs == {"fails": 2, "is-delayed": 1}


async def test_an_outage_longer_than_the_locks(scene: Scene) -> None:
    """Who holds a job renews its lock before anybody takes the job for stalled."""
    scene.worker_options = {"lockDuration": 2000, "stalledInterval": 500}
    async with scene.work(), scene.work():
        jobs = [f"held-{n}" for n in range(6)]
        await scene.add(*jobs, payload={"held": True})
        for job in jobs:
            await scene.db.until_status(job, "active")
        for _ in range(2):
            # Just after a check, which marks what has no lock at the next one.
            await scene.until_checked()
            await scene.server.stop()
            await pass_time(2.2)
            await scene.server.start()
            for _ in range(2):
                await scene.until_checked()
        scene.go_on.set()
        await scene.until_completed(*jobs)
    assert set(scene.runs.values()) == {1}


async def pass_time(seconds: float) -> None:
    """Let an outage last."""
    over = time.monotonic() + seconds
    await until(lambda: time.monotonic() > over)


async def test_a_half_open_connection_costs_only_time(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine is gone without a word; another one has its address."""
    monkeypatch.setattr(Channel.execute, "__kwdefaults__", {"patience": 1.0})
    monkeypatch.setattr(marker, "REPLY_PATIENCE", 1.0)
    scene.worker_options = {"drainDelay": 0.5}
    async with scene.work():
        await scene.add("held", payload={"held": True})
        await scene.db.until_status("held", "active")
        scene.proxy.freeze()
        scene.go_on.set()
        await scene.add("after")
        await scene.until_completed("held", "after")
    assert scene.runs == {"held": 1, "after": 1}


TASKS = """
    from autoflow_worker import define_task

    async def handler(payload, ctx):
        pass

    tasks = [define_task(f"storms-{n}", handler) for n in range(5)]
"""


@pytest.mark.parametrize("way", ["stop", "suspend"])
async def test_waiting_for_redis_costs_next_to_nothing(
    worker_process: WorkerStarter, own_redis: OwnServer, way: str
) -> None:
    worker = worker_process(TASKS, REDIS_URL=own_redis.url, WORKER_CONCURRENCY="20")
    await worker.until_logged("worker_started")
    if way == "stop":
        await own_redis.stop()
        await worker.until_logged("redis_connection_lost")
    else:
        own_redis.suspend()
    process = psutil.Process(worker.pid)
    began, before = time.monotonic(), sum(process.cpu_times()[:2])
    await pass_time(2)
    used, elapsed = sum(process.cpu_times()[:2]) - before, time.monotonic() - began
    assert used < elapsed / 10
    assert len(worker.logged("redis_connection_lost")) == (way == "stop")
    if way == "stop":
        await own_redis.start()
        await worker.until_logged("redis_connection_restored")
    else:
        own_redis.resume()
    worker.terminate()
    assert await worker.wait() == 0


# -- lost replies ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Acknowledgement:
    """What is acknowledged by which script, and what becomes of the job."""

    script: str
    payload: Payload
    options: dict[str, Any]
    end: str


ACKNOWLEDGEMENTS = {
    "complete": Acknowledgement("moveToFinished", {}, {}, "completed"),
    "fail": Acknowledgement("moveToFinished", {"failures": 1}, {}, "failed"),
    "delay": Acknowledgement(
        "moveToDelayed", {"failures": 1}, {"attempts": 2, "backoff": 100}, "completed"
    ),
    "retry": Acknowledgement("retryJob", {"failures": 1}, {"attempts": 2}, "completed"),
}


@pytest.mark.parametrize("concurrency", [1, 3])
@pytest.mark.parametrize("what", ACKNOWLEDGEMENTS)
async def test_a_lost_reply_to_an_acknowledgement(
    scene: Scene, what: str, concurrency: int
) -> None:
    """The reply may have brought the next job: that one is found, and run."""
    jobs, ack = ["first", "second", "third", "fourth"], ACKNOWLEDGEMENTS[what]
    await scene.add(*jobs, payload=ack.payload, **ack.options)
    lost = scene.proxy.lose_reply_to(sha_of(ack.script))
    async with scene.work(concurrency):
        for job in jobs:
            await scene.db.until_status(job, ack.end)
        await until(lambda: all_in(scene, ack.end, jobs))
    # Each was sent once; what else was on its way when the connection broke, perhaps again.
    assert lost.sprung.is_set()
    assert len(jobs) <= lost.count < len(jobs) + concurrency
    assert scene.runs == dict.fromkeys(jobs, ack.options.get("attempts", 1))


async def all_in(scene: Scene, end: str, jobs: list[str]) -> bool:
    return {await scene.state(job) for job in jobs} == {end}


async def test_a_lost_reply_to_a_fetch(scene: Scene) -> None:
    async with scene.work():
        await scene.add("before")
        await scene.until_completed("before")
        lost = scene.proxy.lose_reply_to(sha_of("moveToActive"))
        await scene.add("claimed-unawares", "next")
        await scene.until_completed("claimed-unawares", "next")
        assert lost.sprung.is_set()
    assert scene.runs == {"before": 1, "claimed-unawares": 1, "next": 1}


@pytest.mark.parametrize("script", ["extendLocks", "moveStalledJobsToWait"])
async def test_a_lost_reply_to_a_keeper(scene: Scene, script: str) -> None:
    scene.worker_options = {"lockDuration": 2000, "stalledInterval": 500}
    async with scene.work():
        await scene.add("held", payload={"held": True})
        await scene.db.until_status("held", "active")
        lost = scene.proxy.lose_reply_to(sha_of(script))
        await until(lambda: lost.count > 2)
        scene.go_on.set()
        await scene.until_completed("held")
    assert scene.runs == {"held": 1}


async def test_a_lost_reply_to_handing_back(scene: Scene) -> None:
    await scene.add("held", payload={"held": True})
    async with scene.work(worker_shutdown_grace=0.05) as worker:
        await scene.db.until_status("held", "active")
        lost = scene.proxy.lose_reply_to(sha_of("moveToDelayed"))
        assert await worker.stop() == 4
        assert lost.sprung.is_set()
    assert await scene.state("held") in ("wait", "delayed")
    scene.go_on.set()
    async with scene.work():
        await scene.until_completed("held")
    assert (await scene.db.task("held")).attempts == 1
