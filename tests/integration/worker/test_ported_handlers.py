"""Handlers that come from the Node worker, and payloads that name their correlation id."""

from typing import Any

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, define_task
from tests.support.database import Database
from tests.support.node import Node, Scheduled
from tests.support.running import RunWorker

Json = dict[str, Any]


class Mail(BaseModel):
    to: str
    correlationId: str  # noqa: N815 - the field's name in the job


async def failing(payload: Json, ctx: TaskContext) -> Json:
    if ctx.attempt == 1:
        return {"success": False, "reason": "the mail server is full"}
    return {"success": True, "output": {"sent": 1}, "duration": 42}


async def echoing(payload: Mail, ctx: TaskContext) -> list[str]:
    return [payload.to, payload.correlationId, ctx.correlation_id]


async def test_a_reported_failure_is_retried_and_a_result_is_not_wrapped_twice(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    job = Scheduled(backoff=600_000)
    await db.insert_tasks("q", {job.task_id: {}})
    async with run_worker([define_task("q", failing, TaskOptions())]):
        await node5.schedule_all("q", [job])
        row = await db.until_status(job.task_id, "delayed")
        assert row.error is not None
        assert row.error.reason == "the mail server is full"
        await node5.job("q", job.task_id, "promote")
        row = await db.until_status(job.task_id, "completed")
    assert row.result is not None
    assert (row.result.output, row.result.duration) == ({"sent": 1}, 42)
    returned = (await node5.get_job("q", job.task_id) or {})["returnvalue"]
    assert returned == {"success": True, "output": {"sent": 1}, "duration": 42}


async def test_a_payload_may_name_the_correlation_id(
    node5: Node, db: Database, run_worker: RunWorker
) -> None:
    job = Scheduled({"to": "a@b.c"}, correlation_id="c-7")
    await db.insert_tasks("q", {job.task_id: {}})
    async with run_worker([define_task("q", echoing)]):
        await node5.schedule_all("q", [job])
        row = await db.until_status(job.task_id, "completed")
    assert row.result is not None
    assert row.result.output == ["a@b.c", "c-7", "c-7"]
