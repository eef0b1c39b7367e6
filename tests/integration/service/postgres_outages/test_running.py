"""PostgreSQL goes away while jobs run: no outcome is lost, and BullMQ is told none too early."""

import asyncio
import signal
from collections.abc import Awaitable, Callable

import pytest

from autoflow_worker.recording import recorder
from tests.support.database import Database, open_database
from tests.support.node import KEEP_ALL, Scheduled
from tests.support.postgres_scene import (
    CONCURRENCY,
    LOCK_MS,
    QUEUE,
    WAYS,
    Scene,
    locked,
)
from tests.support.until import until


@pytest.mark.parametrize("way", WAYS)
async def test_outcomes_wait_with_their_slots_and_locks(scene: Scene, way: str) -> None:
    count = 100
    scene.gate.clear()
    async with scene.worker():
        await scene.schedule(count)
        await until(lambda: len(scene.started) == CONCURRENCY)
        async with WAYS[way](scene):
            scene.gate.set()
            await scene.until_stuck()
            # What ran has finished, and nothing else has started: memory stays bounded.
            assert scene.ended.total() == CONCURRENCY
            assert await scene.finished() == 0
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
    async with open_database(scene.postgres.url) as db:
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
    async with open_database(scene.postgres.url) as db:
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
    async with open_database(scene.postgres.url) as db:
        url = await url_of_worker(db)
        await scene.schedule(200)
        async with scene.worker(database_url=url):
            await scene.until_finished(20)
            await db.execute("REVOKE ALL ON tasks FROM worker")
            await scene.until_stuck()
            await url_of_worker(db)
            await scene.until_finished(200)
    await scene.check(200)
