"""A worker that reaches Redis through a proxy, and the ways in which Redis can be away."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.configured import ConfiguredRedis
from tests.support.database import Database
from tests.support.plain import producer, state
from tests.support.proxy import Proxy
from tests.support.running import Running, running
from tests.support.scripts import load_scripts
from tests.support.servers import OwnServer
from tests.support.until import until

Payload = dict[str, Any]
QUEUE = "storms"


@dataclass
class Scene:
    """A worker and its producer, which reach Redis through a proxy.

    Attributes:
        server: the server to break.
        runs: how often each job's handler has started.
        go_on: handlers of jobs with `held` in the payload wait for this event.
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
        """Wait until both stores say that these jobs are completed."""
        for job in jobs:
            await self.db.until_status(job, "completed")

            async def acknowledged(job: str = job) -> bool:
                return await self.state(job) == "completed"

            await until(acknowledged)

    async def admin(self, *command: Any) -> Any:
        async with Redis.from_url(self.server.url, decode_responses=True) as redis:
            return await redis.execute_command(*command)  # type: ignore[no-untyped-call]

    async def until_checked(self) -> None:
        """Wait for the next stalled check of any worker.

        A check may follow another at once, so compare the mark's expiry, not its existence.
        """
        mark = f"{self.prefix}:{QUEUE}:stalled-check"
        earlier = await self.admin("PEXPIRETIME", mark)

        async def renewed() -> bool:
            return bool(await self.admin("PEXPIRETIME", mark) > earlier)

        await until(renewed)

    async def load_scripts(self) -> None:
        """Load BullMQ's scripts, so that no first reply is NOSCRIPT."""
        async with Redis.from_url(self.server.url) as redis:
            await load_scripts(redis)


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
    """Kill each of the worker's connections by itself, twice."""
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
    """A replica takes over, and then has the server's address."""
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
