"""PostgreSQL away, in every way there is: nothing is lost, nothing is told too early."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.errors import DatabaseUnavailableError
from autoflow_worker.local.embedded import EmbeddedPostgres
from autoflow_worker.recording import recorder
from tests.support.agreement import bull_jobs, differences
from tests.support.database import (
    Connection,
    Database,
    check_rows,
    new_task_id,
    reset_database,
)
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerStarter
from tests.support.running import Running, running
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "a-queue"
CONCURRENCY = 20
LOCK_MS = 2500
KEEP_ALL = {"removeOnComplete": False, "removeOnFail": False}


@asynccontextmanager
async def database(server: OwnServer) -> AsyncIterator[Database]:
    async with await Connection.connect(server.url, autocommit=True) as connection:
        yield Database(server.url, connection)


@dataclass
class Scene:
    """One queue, one worker in this process, and a PostgreSQL of the test's own.

    Attributes:
        started, ended: how often each job's handler has.
        gate: handlers wait for it before they end.
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
        async with database(self.postgres) as db:
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
        """All jobs are finished, and both stores tell the same of each."""
        async with database(self.postgres) as db:
            rows = await db.rows()
        jobs = await bull_jobs(self.redis, self.prefix, QUEUE)
        assert differences(rows, jobs) == []
        expected = {"completed": count - count // 10, "failed": count // 10}
        assert Counter(row["status"] for row in rows.values()) == expected


@pytest.fixture(scope="module")
def module_postgres() -> Iterator[OwnServer]:
    """One server for this module's tests: each leaves it whole, and starting one takes long."""
    server = EmbeddedPostgres()
    server.start()
    yield OwnServer(server)
    server.close()


@pytest.fixture
async def postgres(module_postgres: OwnServer) -> AsyncIterator[OwnServer]:
    """A server with an empty tasks table, which the test may break."""
    server = module_postgres
    await reset_database(server.url)
    yield server
    if not server.server.running:
        await server.start()
    await check_rows(server.url)


@pytest.fixture
async def scene(  # noqa: PLR0917 - fixtures
    postgres: OwnServer,
    node5: Node,
    redis: Redis,
    prefix: str,
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    # Starts go on after a second here, so that a test sees it happen.
    monkeypatch.setattr(recorder, "START_PATIENCE", 0.2)
    scene = Scene(postgres, node5, redis, prefix, redis_url)
    scene.gate.set()
    return scene


# -- the ways in which it can be away -------------------------------------------------------------


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
    """As a standby is, after a failover."""
    async with database(scene.postgres) as db:
        await db.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        await db.execute("SELECT pg_reload_conf()")
        try:
            yield
        finally:
            await db.execute("ALTER SYSTEM RESET default_transaction_read_only")
            await db.execute("SELECT pg_reload_conf()")


@asynccontextmanager
async def refusing(scene: Scene, code: str) -> AsyncIterator[None]:
    """Each update fails with this SQLSTATE."""
    async with database(scene.postgres) as db:
        await db.execute(
            "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN RAISE 'as ordered' USING ERRCODE = '{code}'; END $$;"
            "CREATE TRIGGER refuse BEFORE UPDATE ON tasks EXECUTE FUNCTION refuse()"
        )
        yield
        await db.execute("DROP TRIGGER refuse ON tasks; DROP FUNCTION refuse")


@asynccontextmanager
async def locked(scene: Scene) -> AsyncIterator[None]:
    """A migration holds the table."""
    async with await Connection.connect(scene.postgres.url) as connection:
        await connection.execute("LOCK TABLE tasks")
        yield


@asynccontextmanager
async def dropped(scene: Scene) -> AsyncIterator[None]:
    """The table is elsewhere for a while."""
    async with database(scene.postgres) as db:
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


@pytest.mark.parametrize("way", WAYS)
async def test_outcomes_wait_with_their_slots_and_locks(scene: Scene, way: str) -> None:
    count = 100
    scene.gate.clear()
    async with scene.worker() as worker:
        await scene.schedule(count)
        await until(lambda: len(scene.started) == CONCURRENCY)
        async with WAYS[way](scene):
            scene.gate.set()
            await scene.until_stuck()
            # What ran has finished, and nothing else has started: memory stays bounded.
            assert scene.ended.total() == CONCURRENCY
            assert await scene.finished() == 0
            keeper = worker.service.recorder
            assert keeper is not None
            assert len(keeper._outstanding()) == CONCURRENCY
            # Longer than a lock lasts, so they are renewed; no job is taken for stalled.
            for _ in range(15):
                await asyncio.sleep(LOCK_MS / 10_000)
                assert await scene.locks() == CONCURRENCY
        await scene.until_finished(count)
        # Nothing ran again because of it.
        assert scene.started.total() == count + count // 5
    await scene.check(count)


async def test_a_handler_starts_all_the_same_after_a_while(scene: Scene) -> None:
    async with scene.worker() as worker:
        await scene.postgres.stop()
        jobs = [
            Scheduled({"n": n}, f"not-of-the-api-{n}", attempts=2, backoff=20, opts=KEEP_ALL)
            for n in range(100)
        ]
        await scene.node.schedule_all(QUEUE, jobs)
        await scene.until_stuck()
        assert scene.ended.total() == CONCURRENCY
        assert worker.exit_code is None
        await scene.postgres.start()
        # These jobs have no rows yet; they get them now, with their outcomes.
        await scene.until_finished(100)
    await scene.check(100)


async def test_a_handler_waits_for_its_row_first(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "START_PATIENCE", 60)
    async with scene.worker():
        async with locked(scene):
            await scene.node.schedule(QUEUE, {"n": 0}, task_id="a-job", opts=KEEP_ALL)

            async def claimed() -> bool:
                return await scene.active() == ["a-job"]

            await until(claimed)
            await asyncio.sleep(1)
            assert not scene.started
        await scene.until_finished(1)
    assert scene.started == {"a-job": 1}


# -- under load -----------------------------------------------------------------------------------


async def restarted(scene: Scene) -> None:
    """`pg_ctl restart -m immediate`: no farewell, and recovery at the start."""
    await asyncio.to_thread(scene.postgres.server.stop, signal.SIGQUIT)
    await scene.postgres.start()


async def killed_and_started(scene: Scene) -> None:
    await scene.postgres.kill()
    await scene.postgres.start()


async def ended_connections(scene: Scene) -> None:
    async with database(scene.postgres) as db:
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        )


@pytest.mark.parametrize(
    ("breaking", "times"), [(restarted, 2), (killed_and_started, 2), (ended_connections, 20)]
)
async def test_broken_under_load(
    scene: Scene, breaking: Callable[[Scene], Awaitable[None]], times: int
) -> None:
    count = 600
    await scene.schedule(count)
    async with scene.worker():
        for turn in range(times):
            await scene.until_finished((turn + 1) * count // (times + 2))
            await breaking(scene)
        await scene.until_finished(count)
        assert scene.started.total() == count + count // 5
    await scene.check(count)


async def url_of_worker(db: Database) -> str:
    """The database's URL for a user of its own, who may do no more than needed."""
    [(exists,)] = await db.fetch("SELECT count(*) FROM pg_roles WHERE rolname = 'worker'")
    if not exists:
        await db.execute("CREATE ROLE worker LOGIN")
    await db.execute("GRANT USAGE ON SCHEMA public TO worker")
    await db.execute("GRANT SELECT, INSERT, UPDATE ON tasks TO worker")
    return db.url.replace("postgres@", "worker@")


async def test_too_many_connections(scene: Scene) -> None:
    async with database(scene.postgres) as db:
        url = await url_of_worker(db)
        await scene.schedule(200)
        async with scene.worker(database_url=url):
            await scene.until_finished(20)
            await db.execute("ALTER ROLE worker CONNECTION LIMIT 0")
            await ended_connections_of(db, "worker")
            await scene.until_stuck()
            await db.execute("ALTER ROLE worker CONNECTION LIMIT -1")
            await scene.until_finished(200)
    await scene.check(200)


async def ended_connections_of(db: Database, role: str) -> None:
    await db.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", role
    )


async def test_privileges_that_are_taken_away_for_a_while(scene: Scene) -> None:
    async with database(scene.postgres) as db:
        url = await url_of_worker(db)
        await scene.schedule(200)
        async with scene.worker(database_url=url):
            await scene.until_finished(20)
            await db.execute("REVOKE ALL ON tasks FROM worker")
            await scene.until_stuck()
            await url_of_worker(db)
            await scene.until_finished(200)
    await scene.check(200)


# -- starting -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stopped", "killed", "hanging"])
async def test_a_start_waits_for_it(scene: Scene, way: str) -> None:
    async def start() -> None:
        async with scene.worker(worker_startup_timeout=60):
            await scene.node.schedule(QUEUE, {"n": 0}, opts=KEEP_ALL)
            await scene.until_finished(1)

    async with WAYS[way](scene):
        starting = asyncio.create_task(start())
        await asyncio.wait({starting}, timeout=1)
        assert not starting.done()
    await starting


@pytest.mark.parametrize("way", ["stopped", "hanging"])
async def test_a_start_gives_up_in_time(scene: Scene, way: str) -> None:
    loop = asyncio.get_running_loop()
    async with WAYS[way](scene):
        began = loop.time()
        with pytest.raises(DatabaseUnavailableError, match="waited 1 s") as caught:
            async with scene.worker(worker_startup_timeout=1):
                pytest.fail("started")
        assert loop.time() - began < 20
        assert caught.value.exit_code == 3


@pytest.fixture
async def guarded(postgres: OwnServer) -> OwnServer:
    """A server that asks a user `guarded` for a password, and lets `stranger` in nowhere."""
    async with database(postgres) as db:
        await db.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'; CREATE ROLE stranger LOGIN")
        [(path,)] = await db.fetch("SHOW hba_file")
        rules = "host all guarded all scram-sha-256\nhost all stranger all reject\n"
        read = "SELECT pg_read_file(%s)"
        [(before,)] = await db.fetch(read, path)
        with open(path, "w") as file:  # noqa: ASYNC230, PTH123 - a small local file
            file.write(rules + before)
        await db.execute("SELECT pg_reload_conf()")
    return postgres


REFUSALS = [
    ("guarded:wrong", "autoflow", "password authentication failed for user"),
    ("guarded", "autoflow", "no password supplied"),
    ("nobody", "autoflow", 'role "nobody" does not exist'),
    ("postgres", "missing", 'database "missing" does not exist'),
    ("stranger", "autoflow", "pg_hba.conf rejects"),
]


async def test_a_refusal_is_not_tried_again(
    guarded: OwnServer, worker_process: WorkerStarter
) -> None:
    parts = urlsplit(guarded.url)
    workers = []
    for user, name, _ in REFUSALS:
        netloc = f"{user}@{parts.hostname}:{parts.port}"
        url = urlunsplit(parts._replace(netloc=netloc, path=f"/{name}"))
        workers.append(worker_process(TASKS, DATABASE_URL=url, WORKER_STARTUP_TIMEOUT="600"))
    for worker, (_, _, reason) in zip(workers, REFUSALS, strict=True):
        assert await worker.wait() == 3
        assert reason in worker.stderr
        assert ":wrong" not in worker.stderr + worker.stdout
        assert "Traceback" not in worker.stderr + worker.stdout


TASKS = """
    from autoflow_worker import define_task

    async def handle(payload: dict, ctx) -> None:
        pass

    tasks = [define_task("a-queue", handle)]
"""


async def test_the_process_exits_with_3_when_it_stays_away(
    postgres: OwnServer, worker_process: WorkerStarter
) -> None:
    await postgres.stop()
    worker = worker_process(TASKS, DATABASE_URL=postgres.url, WORKER_STARTUP_TIMEOUT="0.5")
    assert await worker.wait() == 3
    assert "PostgreSQL can't be reached" in worker.stderr
    assert "Traceback" not in worker.stderr


# -- stopping -------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["stopped", "hanging", "table locked"])
@pytest.mark.parametrize("aborts", [False, True])
async def test_a_stop_meanwhile_ends_by_the_deadline(scene: Scene, way: str, aborts: bool) -> None:
    loop = asyncio.get_running_loop()
    count = 60
    await scene.schedule(count)
    async with scene.worker(worker_shutdown_grace=60 if aborts else 0.5) as worker:
        scene.gate.clear()
        await until(lambda: scene.started.total() - scene.ended.total() == CONCURRENCY)
        async with WAYS[way](scene):
            scene.gate.set()
            await scene.until_stuck()
            began = loop.time()
            exit_code = await (worker.abort() if aborts else worker.stop())
            took = loop.time() - began
            assert exit_code == 4
            assert took < (0 if aborts else 0.5) + 15
            # Handed back: nothing is active or locked, and no attempt is used up.
            jobs = await bull_jobs(scene.redis, scene.prefix, QUEUE)
            assert {job.status for job in jobs.values()} <= {"pending", "delayed", "completed"}
            assert not any(job.locked for job in jobs.values())
    ran = scene.started.copy()
    async with scene.worker():
        await scene.until_finished(count)
    # Each attempt whose outcome had been recorded was not run again.
    assert (scene.started - ran).total() <= count + count // 5
    await scene.check(count)


async def test_a_stop_waits_for_its_return(scene: Scene) -> None:
    count = 60
    await scene.schedule(count)
    scene.gate.clear()
    async with scene.worker(worker_shutdown_grace=60) as worker:
        await until(lambda: scene.started.total() == CONCURRENCY)
        async with stopped(scene):
            scene.gate.set()
            await scene.until_stuck()
            stopping = asyncio.create_task(worker.stop())
            await asyncio.wait({stopping}, timeout=1)
            assert not stopping.done()
        assert await stopping == 0
    assert scene.started.total() == CONCURRENCY
    assert not await scene.active()
    async with scene.worker():
        await scene.until_finished(count)
    await scene.check(count)
