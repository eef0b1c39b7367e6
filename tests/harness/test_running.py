"""The harness's worker in the test's own process."""

import pytest

from autoflow_worker import define_task
from autoflow_worker.errors import DatabaseUnavailableError
from tests.support.database import Database
from tests.support.node import Node
from tests.support.running import RunWorker, end_part


async def handler(payload: dict[str, object], ctx: object) -> dict[str, object]:
    return payload


async def test_it_runs_a_job_and_stops(run_worker: RunWorker, node5: Node, db: Database) -> None:
    async with run_worker([define_task("q", handler)]) as worker:
        task_id = await db.insert_task("q", {"a": 1})
        await node5.schedule("q", {"a": 1}, task_id=task_id)
        assert (await db.until_status(task_id, "completed")).attempts == 1
        assert worker.exit_code is None
    assert worker.exit_code == 0


async def test_a_worker_that_ends_unasked_fails_the_test(run_worker: RunWorker) -> None:
    async def block() -> None:
        async with run_worker([define_task("q", handler)]) as worker:
            end_part("slot 0 of q")
            await worker.stopping.wait()

    with pytest.raises(AssertionError, match="unasked"):
        await block()


async def test_a_worker_that_can_not_start(run_worker: RunWorker) -> None:
    with pytest.raises(DatabaseUnavailableError):
        async with run_worker(
            [define_task("q", handler)],
            database_url="postgresql://x@127.0.0.1:1/x",
            worker_startup_timeout=0.1,
        ):
            pytest.fail("not entered")
