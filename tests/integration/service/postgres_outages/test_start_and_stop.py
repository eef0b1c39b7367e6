"""PostgreSQL is away when the worker starts or stops: the wait has an end, and no job is lost."""

import asyncio
from urllib.parse import urlsplit, urlunsplit

import pytest

from autoflow_worker.errors import DatabaseUnavailableError
from tests.support.agreement import bull_jobs
from tests.support.database import open_database
from tests.support.node import KEEP_ALL
from tests.support.postgres_scene import CONCURRENCY, QUEUE, WAYS, Scene, stopped
from tests.support.process import WorkerStarter
from tests.support.servers import OwnServer
from tests.support.until import until

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
    async with open_database(postgres.url) as db:
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
