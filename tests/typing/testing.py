"""Only checked, never run: what type checkers know about the helpers for tests."""

from collections.abc import Sequence
from typing import Any, assert_type

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskScheduler, define_task
from autoflow_worker.testing import (
    RecordingScheduler,
    ScheduledTask,
    TaskRun,
    run_task,
    worker_on_embedded_servers,
)


class Email(BaseModel):
    address: str


class Invoice(BaseModel):
    number: int


async def send(payload: Email, ctx: TaskContext) -> dict[str, bool]:
    return {"sent": True}


async def sign_up(scheduler: TaskScheduler) -> None:
    await scheduler.schedule(sending, Email(address="ann@example.com"))


sending = define_task("mails", send)


async def uses() -> None:
    run = await run_task(sending, Email(address="ann@example.com"), attempt=2, cancel_after=0.1)
    assert_type(run, TaskRun)
    assert_type(run.error, str | None)
    assert_type(run.logs, list[str])
    await run_task(sending, {"address": "ann@example.com"}, resources=object())
    scheduler = RecordingScheduler()
    await sign_up(scheduler)
    assert_type(scheduler.assert_scheduled(sending, address="ann@example.com"), ScheduledTask)
    runs: Sequence[TaskRun] = await scheduler.drain()
    assert_type(runs[0].retry_in_ms, int | None)
    async with worker_on_embedded_servers([sending], worker_concurrency=2) as worker:
        assert_type(await worker.run(sending, Email(address="x")), dict[str, Any])
        await sign_up(worker.scheduler)


# Each of these is a mistake that has to be found.
async def mistakes() -> None:
    await run_task(sending, Invoice(number=1))  # type: ignore[misc]
    await run_task(send, {})  # type: ignore[arg-type]
    await run_task(sending, {}, attempt="2")  # type: ignore[arg-type]
    await run_task(sending, {}, atempt=2)  # type: ignore[call-arg]
    run = await run_task(sending, {})
    assert_type(run.outcome == "complete", bool)  # type: ignore[comparison-overlap]
    assert_type(run.result, Any)  # type: ignore[attr-defined]
    scheduler = RecordingScheduler()
    await scheduler.schedule(sending, Invoice(number=1))  # type: ignore[misc]
    await scheduler.schedule(sending, {}, delay=5)  # type: ignore[call-arg]
    scheduler.assert_scheduled("mails")  # type: ignore[arg-type]
    async with worker_on_embedded_servers(sending) as worker:  # type: ignore[arg-type]
        await worker.run(sending, Invoice(number=1))  # type: ignore[misc]
