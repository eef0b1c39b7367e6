"""`RecordingScheduler` takes a `TaskScheduler`'s place."""

import inspect
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel

from autoflow_worker import (
    PayloadError,
    RetryLater,
    TaskContext,
    TaskScheduler,
    WorkerError,
    define_task,
)
from autoflow_worker.testing import RecordingScheduler


class Report(BaseModel):
    month: date
    copies: list[str] = []


async def render(payload: Report, ctx: TaskContext) -> str:
    if ctx.attempt < 2:
        raise OSError("the printer is busy")
    return f"{payload.month:%Y-%m}.pdf"


rendering = define_task("reports-render", render)


async def sign_off(scheduler: TaskScheduler) -> str:
    """An application's own function."""
    async with scheduler:
        report = Report(month=date(2026, 11, 1), copies=["ann"])
        return await scheduler.schedule(rendering, report, delay_ms=500, user_id="u1")


async def test_what_was_scheduled_is_asserted_by_its_fields() -> None:
    scheduler = RecordingScheduler()
    task_id = await sign_off(scheduler)
    noted = scheduler.assert_scheduled(rendering, month=date(2026, 11, 1), copies=["ann"])
    assert scheduler.scheduled == [noted]
    assert (noted.task_id, noted.delay_ms, noted.user_id) == (task_id, 500, "u1")
    assert noted.payload == {"month": "2026-11-01", "copies": ["ann"]}
    assert scheduler.assert_scheduled(rendering) is noted
    with pytest.raises(AssertionError) as caught:
        scheduler.assert_scheduled(rendering, month="2026-12-01")
    assert "reports-render {'month': '2026-11-01', 'copies': ['ann']}" in str(caught.value)
    with pytest.raises(AssertionError, match="nothing"):
        RecordingScheduler().assert_scheduled(rendering)


async def test_it_refuses_what_a_scheduler_refuses() -> None:
    scheduler = RecordingScheduler()
    with pytest.raises(PayloadError):
        await scheduler.schedule(rendering, {"month": "never"})
    with pytest.raises(WorkerError, match="delay_ms"):
        await scheduler.schedule(rendering, {"month": "2026-11-01"}, delay_ms=-1)
    assert scheduler.scheduled == []


async def test_drain_runs_what_was_scheduled_to_its_end_and_in_order() -> None:
    scheduler = RecordingScheduler()
    seen: list[tuple[str, str, object]] = []

    async def export(payload: dict[str, Any], ctx: TaskContext[RecordingScheduler]) -> None:
        seen.append((ctx.task_id, ctx.correlation_id, ctx.last_progress))
        if ctx.last_progress is None:
            ctx.progress(7)
            raise RetryLater(60)
        await ctx.resources.schedule(rendering, {"month": "2026-11-01"})

    exporting = define_task("accounts-export", export, lifespan=never)  # type: ignore[arg-type]
    task_id = await scheduler.schedule(exporting, {}, correlation_id="c1")
    await scheduler.schedule(rendering, {"month": "2026-10-01"})
    runs = await scheduler.drain(resources=scheduler)
    assert [run.output for run in runs] == [None, "2026-10.pdf", "2026-11.pdf"]
    assert [run.attempt for run in runs] == [1, 2, 2]
    assert seen == [(task_id, "c1", None), (task_id, "c1", 7)]
    assert len(scheduler.scheduled) == 3
    assert await scheduler.drain() == []


async def never() -> None: ...


async def test_drain_gives_up_on_a_task_that_comes_back_for_ever() -> None:
    async def later(payload: Any, ctx: TaskContext) -> None:
        raise RetryLater(0)

    scheduler = RecordingScheduler()
    await scheduler.schedule(define_task("q", later), {})
    with pytest.raises(AssertionError, match="after 100 runs: retry_later"):
        await scheduler.drain()


def test_it_has_all_that_a_scheduler_has() -> None:
    public = {name for name in vars(TaskScheduler) if not name.startswith("_")}
    assert public <= vars(RecordingScheduler).keys()
    for name in public:
        ours, theirs = (getattr(each, name) for each in (RecordingScheduler, TaskScheduler))
        names = [list(inspect.signature(method).parameters) for method in (ours, theirs)]
        assert names[0] == names[1]
