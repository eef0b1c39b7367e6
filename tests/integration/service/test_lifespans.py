"""What tasks share by `lifespan`, and what each attempt is inside of by `around`."""

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, define_task
from autoflow_worker.errors import TaskListError
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import RunWorker

Json = dict[str, Any]


class Shared:
    """A lifespan, and what it saw."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.tasks: set[Any] = set()

    @asynccontextmanager
    async def lifespan(self) -> AsyncIterator[str]:
        self.tasks.add(asyncio.current_task())
        self.events.append("enter")
        # A cancel scope: only the task that entered it may leave it.
        async with asyncio.timeout(None):
            yield "the resource"
        self.tasks.add(asyncio.current_task())
        self.events.append("leave")


async def run_one(
    node: Node, db: Database, run_worker: RunWorker, *tasks: TaskDefinition[Any], **job: Any
) -> list[str | None]:
    """Run one job of each task; return the rows' statuses."""
    jobs = {task.queue_name: Scheduled(**job) for task in tasks}
    async with run_worker(tasks):
        for queue, each in jobs.items():
            await db.insert_tasks(queue, {each.task_id: {}})
            await node.schedule_all(queue, [each])
            await db.until_status(each.task_id, "completed", "failed")
    return [await db.status(each.task_id) for each in jobs.values()]


async def test_tasks_share_it_from_before_the_first_job_until_after_the_last(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    shared = Shared()
    lifespan = shared.lifespan

    async def in_loop(payload: Json, ctx: TaskContext[str]) -> None:
        shared.events.append(ctx.resources)

    def in_thread(payload: Json, ctx: TaskContext[str]) -> None:
        shared.events.append(ctx.resources)

    tasks = [
        define_task("a", in_loop, lifespan=lifespan),
        define_task("b", in_thread, lifespan=lifespan),
    ]
    assert await run_one(node5, db, run_worker, *tasks) == ["completed", "completed"]
    assert shared.events == ["enter", "the resource", "the resource", "leave"]
    assert len(shared.tasks) == 1


async def test_one_that_raises_ends_the_start(run_worker: RunWorker) -> None:
    shared = Shared()

    @asynccontextmanager
    async def broken() -> AsyncIterator[None]:
        raise RuntimeError("no database")
        yield

    async def handler(payload: Json, ctx: TaskContext[Any]) -> None: ...

    tasks = [
        define_task("a", handler, lifespan=shared.lifespan),
        define_task("b", handler, lifespan=broken),
    ]
    with pytest.raises(TaskListError, match=r"broken raised RuntimeError: no database") as raised:
        async with run_worker(tasks):
            pass
    assert raised.value.exit_code == 2
    assert shared.events == ["enter", "leave"]


async def test_one_that_never_yields_ends_the_start(run_worker: RunWorker) -> None:
    @asynccontextmanager
    async def slow() -> AsyncIterator[None]:
        await asyncio.Event().wait()
        yield

    async def handler(payload: Json, ctx: TaskContext[None]) -> None: ...

    with pytest.raises(TaskListError, match=r"has not yielded after 0\.2 s"):
        async with run_worker(
            [define_task("a", handler, lifespan=slow)], worker_startup_timeout=0.2
        ):
            pass


async def test_one_that_hangs_at_the_end_is_cut_off(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    cancelled: list[str] = []

    @asynccontextmanager
    async def hanging() -> AsyncIterator[None]:
        yield
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.append("hanging")

    async def handler(payload: Json, ctx: TaskContext[None]) -> None: ...

    with capture_logs() as logs:
        async with run_worker(
            [define_task("a", handler, lifespan=hanging)], worker_shutdown_grace=0.5
        ):
            pass
    assert cancelled == ["hanging"]
    assert "lifespan_cut_off" in {line["event"] for line in logs}


async def test_an_attempt_is_inside_of_its_context_managers(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    seen: list[tuple[str, str, bool]] = []

    def note(what: str, ctx: TaskContext[Any]) -> None:
        seen.append((ctx.queue_name, what, threading.current_thread() is threading.main_thread()))

    @contextmanager
    def around(ctx: TaskContext[Any]) -> Iterator[None]:
        note("enter", ctx)
        try:
            yield
        except ValueError as error:
            note(str(error), ctx)
            raise
        finally:
            note("leave", ctx)

    @asynccontextmanager
    async def around_async(ctx: TaskContext[Any]) -> AsyncIterator[None]:
        note("enter async", ctx)
        yield
        note("leave async", ctx)

    async def in_loop(payload: Json, ctx: TaskContext) -> None:
        note("run", ctx)

    def in_thread(payload: Json, ctx: TaskContext) -> None:
        note("run", ctx)
        raise ValueError("a fault")

    tasks = [
        define_task("a", in_loop, around=around, around_async=around_async),
        define_task("b", in_thread, around=around),
    ]
    assert await run_one(node5, db, run_worker, *tasks, attempts=1) == ["completed", "failed"]
    steps = ["enter", "enter async", "run", "leave async", "leave"]
    assert [each for each in seen if each[0] == "a"] == [("a", step, True) for step in steps]
    steps = ["enter", "run", "a fault", "leave"]
    assert [each for each in seen if each[0] == "b"] == [("b", step, False) for step in steps]


async def test_what_a_context_manager_raises_fails_the_attempt(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    @contextmanager
    def around(ctx: TaskContext[Any]) -> Iterator[None]:
        raise RuntimeError("no session")
        yield

    async def in_loop(payload: Json, ctx: TaskContext) -> None: ...

    def in_thread(payload: Json, ctx: TaskContext) -> None: ...

    tasks = [define_task("a", in_loop, around=around), define_task("b", in_thread, around=around)]
    assert await run_one(node5, db, run_worker, *tasks, attempts=1) == ["failed", "failed"]
    assert {row["error"]["reason"] for row in (await db.rows()).values()} == {"no session"}
