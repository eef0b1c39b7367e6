"""`worker_on_embedded_servers` runs the real worker, by pytest's fixture and without it."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

from autoflow_worker import TaskContext, define_task
from autoflow_worker.errors import PartDiedError, TaskListError
from autoflow_worker.recording.table import connection_to
from autoflow_worker.testing import EmbeddedServers, EmbeddedWorker, worker_on_embedded_servers
from tests.support.handlers import hang, task
from tests.support.running import end_part

RunOnEmbedded = Callable[..., AbstractAsyncContextManager[EmbeddedWorker]]


@pytest.fixture
def on_shared(server_urls: tuple[str, str]) -> EmbeddedServers:
    """The servers of all tests, in place of a pair of their own."""
    return EmbeddedServers(*server_urls)


async def greet(payload: dict[str, str], ctx: TaskContext) -> str:
    return f"Hello, {payload['name']}!"


greeting = define_task("greetings", greet)


async def databases(servers: EmbeddedServers) -> set[str]:
    async with connection_to(servers.database_url, 10) as connection:
        cursor = await connection.execute("SELECT datname FROM pg_database")
        return {name for (name,) in await cursor.fetchall()}


async def test_a_task_runs_to_its_end_in_both_stores(on_shared: EmbeddedServers) -> None:
    async with worker_on_embedded_servers([greeting], servers=on_shared) as worker:
        row = await worker.run(greeting, {"name": "Ann"}, user_id="u1")
        assert (row["status"], row["userId"]) == ("completed", "u1")
        assert row["result"]["output"] == "Hello, Ann!"
        assert await worker.row("none") is None
        later = await worker.schedule(greeting, {"name": "Bo"}, delay_ms=3_600_000)
        with pytest.raises(TimeoutError, match=r"has not ended after 0 s: .*'delayed'"):
            await worker.until_ended(later, timeout=0)
        await worker.cancel(later)
        assert (await worker.until_ended(later))["status"] == "cancelled"
        name = worker.settings.bullmq_prefix
        assert name in await databases(on_shared)
    assert name not in await databases(on_shared)


async def test_workers_do_not_see_each_other(on_shared: EmbeddedServers) -> None:
    async with (
        worker_on_embedded_servers([greeting], servers=on_shared) as one,
        worker_on_embedded_servers([greeting], servers=on_shared) as other,
    ):
        task_id = (await one.run(greeting, {"name": "Ann"}))["externalId"]
        assert await other.row(task_id) is None


async def test_a_block_that_raises_waits_for_no_handler(on_shared: EmbeddedServers) -> None:
    hanging = task(hang)

    async def failing() -> None:
        async with worker_on_embedded_servers(
            [hanging], servers=on_shared, worker_shutdown_grace=3600
        ) as worker:
            await worker.schedule(hanging, {})
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await failing()


async def test_a_worker_that_dies_fails_the_test(on_shared: EmbeddedServers) -> None:
    hanging = task(hang)

    async def dying() -> None:
        async with worker_on_embedded_servers([hanging], servers=on_shared) as worker:
            task_id = await worker.schedule(hanging, {})
            end_part(f"slot 0 of {hanging.queue_name}")
            with pytest.raises(PartDiedError):
                await worker.until_ended(task_id)

    with pytest.raises(PartDiedError):
        await dying()


async def test_a_worker_that_does_not_start(on_shared: EmbeddedServers) -> None:
    in_process = task(hang, run_in="process")
    with pytest.raises(TaskListError, match="another process"):
        async with worker_on_embedded_servers([in_process], servers=on_shared):
            pytest.fail("the block was entered")


async def test_the_fixture_starts_servers_of_the_run(
    worker_on_embedded_servers: RunOnEmbedded, autoflow_embedded_servers: EmbeddedServers
) -> None:
    async with worker_on_embedded_servers([greeting]) as worker:
        assert worker.settings.redis_url.get_secret_value() == autoflow_embedded_servers.redis_url
        assert (await worker.run(greeting, {"name": "Ann"}))["status"] == "completed"


async def test_without_pytest() -> None:
    async with worker_on_embedded_servers([greeting]) as worker:
        rows = [worker.run(greeting, {"name": name}) for name in ("Ann", "Bo")]
        outputs = [row["result"]["output"] for row in await asyncio.gather(*rows)]
    assert outputs == ["Hello, Ann!", "Hello, Bo!"]


async def test_what_a_handler_reports(run_task: Any, recording_scheduler: Any) -> None:
    await recording_scheduler.schedule(greeting, {"name": "Ann"})
    [drained] = await recording_scheduler.drain()
    run = await run_task(greeting, {"name": "Ann"})
    assert run.output == drained.output == "Hello, Ann!"
