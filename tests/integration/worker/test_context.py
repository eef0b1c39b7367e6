"""What a handler can ask and tell through its context, in the event loop and in a thread."""

import io
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import structlog

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.logs.configure import configure_logging, flush_logs
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import RunWorker

QUEUE = "q"

Json = dict[str, Any]
Body = Callable[[TaskContext], object]


def both_kinds(body: Body, **options: Any) -> list[TaskDefinition[Any]]:
    """Return a task whose handler runs in the loop, and one whose handler runs in a thread."""
    given = TaskOptions(**options)

    async def in_loop(payload: Json, ctx: TaskContext) -> object:
        return body(ctx)

    def in_thread(payload: Json, ctx: TaskContext) -> object:
        return body(ctx)

    return [define_task("loop", in_loop, given), define_task("thread", in_thread, given)]


async def schedule(node: Node, db: Database, queue: str, **job: Any) -> str:
    job_ = Scheduled(**job)
    await db.insert_tasks(queue, {job_.task_id: {}})
    await node.schedule_all(queue, [job_])
    return job_.task_id


async def test_node_sees_the_progress_and_the_log(
    node6: Node, db: Database, run_worker: RunWorker
) -> None:
    def body(ctx: TaskContext) -> None:
        for number in range(1000):
            ctx.progress(number)
        ctx.log("first")
        ctx.log("second \0 with what no store takes")
        ctx.progress({"done": 1000, "of": ["a", None]})

    for task in both_kinds(body):
        queue = task.queue_name
        await node6.listen(queue, "progress", "completed")
        async with run_worker([task]):
            task_id = await schedule(node6, db, queue)
            await node6.until_heard("completed", task_id)
        job = await node6.get_job(queue, task_id)
        assert job is not None
        assert job["progress"] == {"done": 1000, "of": ["a", None]}
        logs = await node6.queue(queue, "getJobLogs", task_id)
        assert logs["logs"] == ["first", "second \ufffd with what no store takes"]
        # The newest value wins, so few of the thousand are heard.
        assert 1 <= len(node6.heard("progress", task_id)) < 500


async def test_a_later_attempt_gets_the_last_progress(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    found: list[object] = []

    def body(ctx: TaskContext) -> None:
        found.append(ctx.last_progress)
        if ctx.attempt == 1:
            ctx.progress({"page": 7})
            raise ValueError

    for task in both_kinds(body):
        found.clear()
        async with run_worker([task]):
            task_id = await schedule(node5, db, task.queue_name, backoff=1)
            await db.until_status(task_id, "completed")
        assert found == [None, {"page": 7}]


async def test_progress_that_is_no_json_is_the_handlers_fault(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    for task in both_kinds(lambda ctx: ctx.progress(object())):
        async with run_worker([task]):
            task_id = await schedule(node5, db, task.queue_name, attempts=1)
            row = await db.until_status(task_id, "failed")
        assert row.error is not None
        assert "can't be stored" in row.error.reason


async def test_the_time_that_is_left(node5: Node, db: Database, run_worker: RunWorker) -> None:
    for limit, expected in ((None, None), (600_000, 600)):
        for task in both_kinds(lambda ctx: ctx.time_left(), timeout_ms=limit):
            async with run_worker([task]):
                task_id = await schedule(node5, db, task.queue_name)
                row = await db.until_status(task_id, "completed")
            assert row.result is not None
            left = row.result.output
            assert left is None if expected is None else 500 < left <= expected


@pytest.mark.parametrize("kind", [0, 1], ids=["loop", "thread"])
async def test_every_line_of_a_handler_names_its_attempt(
    node5: Node, db: Database, run_worker: RunWorker, kind: int
) -> None:
    def body(ctx: TaskContext) -> None:
        structlog.get_logger("a.module").info("by_structlog")
        logging.getLogger("a.library").warning("by_logging")
        ctx.logger.info("by_context")

    task = both_kinds(body)[kind]
    stream = io.StringIO()
    configure_logging("info", "json", stream)
    async with run_worker([task]):
        task_id = await schedule(node5, db, task.queue_name, correlation_id="c-1", attempts=5)
        await db.until_status(task_id, "completed")
    assert flush_logs(10)
    lines = {line["event"]: line for line in map(json.loads, stream.getvalue().splitlines())}
    about = {"queue": task.queue_name, "task_id": task_id, "correlation_id": "c-1"}
    for event in ("by_structlog", "by_logging", "by_context"):
        assert {**about, "attempt": 1, "max_attempts": 5}.items() <= lines[event].items()
    # A line of the worker's own names no attempt that happens to run.
    assert "task_id" not in lines["worker_stopped"]


@pytest.mark.parametrize("end", ["complete", "fail"])
async def test_reports_precede_the_outcome(
    node6: Node, db: Database, run_worker: RunWorker, end: str
) -> None:
    def body(ctx: TaskContext) -> None:
        ctx.progress("the last word")
        if end == "fail":
            raise ValueError

    for task in both_kinds(body):
        queue = task.queue_name
        await node6.listen(queue, "progress", "completed", "failed")
        async with run_worker([task]):
            task_id = await schedule(node6, db, queue, attempts=1)
            await node6.until_heard("completed" if end == "complete" else "failed", task_id)
        names = [event.name for event in node6.events if event.args.get("jobId") == task_id]
        assert names[0] == "progress"
        assert len(names) == 2
