"""A server that hangs, without an error and without an answer, is named; so is its return."""

from pathlib import Path

from tests.support.database import Database, open_database
from tests.support.node import Node
from tests.support.process import WorkerStarter
from tests.support.servers import OwnServer

TASKS = """
    import asyncio
    from pathlib import Path
    from autoflow_worker import TaskOptions, define_task

    async def handler(payload, ctx):
        while not Path("go-on").exists():
            await asyncio.sleep(0.01)

    tasks = [define_task("mails", handler, TaskOptions(concurrency=3, timeout_ms=None))]
"""


async def test_redis_hangs(
    worker_process: WorkerStarter, own_redis: OwnServer, db: Database, prefix: str, tmp_path: Path
) -> None:
    worker = worker_process(TASKS, REDIS_URL=own_redis.url)
    await worker.until_logged("worker_started")
    async with Node(5, own_redis.url, prefix) as node:
        await db.insert_task("mails", {}, task_id="a-job")
        await node.schedule("mails", {}, task_id="a-job")
        await db.until_status("a-job", "active")
        own_redis.suspend()
        # Its outcome is recorded, and waits to be acknowledged.
        (tmp_path / "go-on").touch()
        silent = await worker.until_logged("redis_silent", 60)
        own_redis.resume()
        back = await worker.until_logged("redis_answers_again", 60)
        await db.until_status("a-job", "completed")
    assert back["after_s"] >= silent["for_s"] >= 5
    assert len(worker.logged("redis_silent")) == 1
    worker.terminate()
    assert await worker.wait() == 0


async def test_postgresql_hangs(
    worker_process: WorkerStarter, own_postgres: OwnServer, node5: Node, tmp_path: Path
) -> None:
    worker = worker_process(TASKS, DATABASE_URL=own_postgres.url)
    await worker.until_logged("worker_started")
    async with open_database(own_postgres.url) as db:
        await db.insert_task("mails", {}, task_id="a-job")
        await node5.schedule("mails", {}, task_id="a-job")
        await db.until_status("a-job", "active")
        own_postgres.suspend()
        # Its outcome is on its way into the row.
        (tmp_path / "go-on").touch()
        silent = await worker.until_logged("postgresql_silent", 60)
        own_postgres.resume()
        back = await worker.until_logged("postgresql_answers_again", 60)
        await db.until_status("a-job", "completed")
    assert back["after_s"] >= silent["for_s"] >= 5
    assert len(worker.logged("postgresql_silent")) == 1
    worker.terminate()
    assert await worker.wait() == 0
