"""A worker whose PostgreSQL goes away, and the ways in which it can."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.agreement import bull_jobs, differences
from tests.support.database import Connection, new_task_id, open_database
from tests.support.node import KEEP_ALL, Node, Scheduled
from tests.support.running import Running, running
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "a-queue"
CONCURRENCY = 20
LOCK_MS = 2500


@dataclass
class Scene:
    """One queue, a worker in this process, and a PostgreSQL server that the test may break.

    Attributes:
        started, ended: how often each job's handler has started and ended.
        gate: handlers wait for this event.
    """

    postgres: OwnServer
    node: Node
    redis: Redis
    prefix: str
    redis_url: str
    started: Counter[str] = field(default_factory=Counter)
    ended: Counter[str] = field(default_factory=Counter)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def handle(self, payload: dict[str, Any], ctx: TaskContext) -> dict[str, Any]:
        self.started[ctx.task_id] += 1
        await self.gate.wait()
        await asyncio.sleep(0.005)
        self.ended[ctx.task_id] += 1
        if payload["n"] % 10 == 7 and ctx.attempt == 1:
            raise ValueError("the first time")
        if payload["n"] % 10 == 9:
            raise RuntimeError("every time")
        return payload

    async def schedule(self, count: int) -> None:
        jobs = [
            Scheduled({"n": n}, new_task_id(), attempts=2, backoff=20, opts=KEEP_ALL)
            for n in range(count)
        ]
        async with open_database(self.postgres.url) as db:
            payloads = {job.task_id: job.payload for job in jobs}
            await db.insert_tasks(QUEUE, payloads, maxAttempts=2)
        await self.node.schedule_all(QUEUE, jobs)

    def worker(self, **settings: Any) -> AbstractAsyncContextManager[Running]:
        task = define_task(
            QUEUE,
            self.handle,
            TaskOptions(concurrency=CONCURRENCY, timeout_ms=None),
            worker_options={"lockDuration": LOCK_MS, "stalledInterval": LOCK_MS},
        )
        urls = {"redis_url": self.redis_url, "database_url": self.postgres.url}
        return running([task], prefix=self.prefix, **(urls | settings))

    async def active(self) -> list[str]:
        return [str(i) for i in await self.redis.lrange(f"{self.prefix}:{QUEUE}:active", 0, -1)]

    async def locks(self) -> int:
        keys = [f"{self.prefix}:{QUEUE}:{job_id}:lock" for job_id in await self.active()]
        return int(await self.redis.exists(*keys)) if keys else 0

    async def finished(self) -> int:
        base = f"{self.prefix}:{QUEUE}:"
        return sum([await self.redis.zcard(base + state) for state in ("completed", "failed")])

    async def until_finished(self, count: int, timeout: float = 40) -> None:
        async def enough() -> bool:
            return await self.finished() >= count

        await until(enough, timeout, message=lambda: f"{count} jobs; {self.ended.total()} runs")

    async def until_stuck(self) -> None:
        """Wait until every slot holds an outcome that PostgreSQL can't take."""

        async def stuck() -> bool:
            active = await self.active()
            return len(active) == CONCURRENCY and self.started == self.ended >= Counter(active)

        before = -1
        while before != self.ended.total():
            before = self.ended.total()
            await until(stuck)
            await asyncio.sleep(0.2)

    async def check(self, count: int) -> None:
        """Check that all jobs are finished, and that rows and jobs agree."""
        async with open_database(self.postgres.url) as db:
            rows = await db.rows()
        jobs = await bull_jobs(self.redis, self.prefix, QUEUE)
        assert differences(rows, jobs) == []
        expected = {"completed": count - count // 10, "failed": count // 10}
        assert Counter(row["status"] for row in rows.values()) == expected


# -- the ways in which PostgreSQL can be away ---------------------------------------------------


Breaking = Callable[[Scene], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def stopped(scene: Scene) -> AsyncIterator[None]:
    await scene.postgres.stop()
    try:
        yield
    finally:
        await scene.postgres.start()


@asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    await scene.postgres.kill()
    try:
        yield
    finally:
        await scene.postgres.start()


@asynccontextmanager
async def hanging(scene: Scene) -> AsyncIterator[None]:
    scene.postgres.suspend()
    try:
        yield
    finally:
        scene.postgres.resume()


@asynccontextmanager
async def read_only(scene: Scene) -> AsyncIterator[None]:
    """PostgreSQL refuses writes, as a standby does after a failover."""
    async with open_database(scene.postgres.url) as db:
        await db.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await db.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            await db.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await db.execute("SELECT pg_reload_conf()")


@asynccontextmanager
async def refusing(scene: Scene, code: str) -> AsyncIterator[None]:
    """PostgreSQL refuses each update with this SQLSTATE."""
    async with open_database(scene.postgres.url) as db:
        await db.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE 'as ordered' USING ERRCODE = '{code}'; END $$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON tasks EXECUTE FUNCTION refuse()"
        )
        yield
        await db.execute("DROP TRIGGER refuse ON tasks; DROP FUNCTION refuse")


@asynccontextmanager
async def locked(scene: Scene) -> AsyncIterator[None]:
    """A migration holds a lock on the table."""
    async with await Connection.connect(scene.postgres.url) as connection:
        await connection.execute("LOCK TABLE tasks")
        yield


@asynccontextmanager
async def dropped(scene: Scene) -> AsyncIterator[None]:
    """The table has another name for a while."""
    async with open_database(scene.postgres.url) as db:
        await db.execute("ALTER TABLE tasks RENAME TO tasks_elsewhere")
        yield
        await db.execute("ALTER TABLE tasks_elsewhere RENAME TO tasks")


WAYS: dict[str, Breaking] = {
    "stopped": stopped,
    "killed": killed,
    "hanging": hanging,
    "read-only": read_only,
    "disk full": partial(refusing, code="53100"),
    "out of memory": partial(refusing, code="53200"),
    "table locked": locked,
    "table away": dropped,
}
