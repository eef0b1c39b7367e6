"""`run_task` says what the worker would record, without servers."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from typing import Any

import pytest
from pydantic import BaseModel

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    DelayedError,
    RateLimited,
    RetryLater,
    TaskContext,
    TaskOptions,
    UnrecoverableError,
    define_task,
)
from autoflow_worker.errors import NeedsServersError, PayloadError, TaskListError
from autoflow_worker.testing import run_task
from tests.support.handlers import hang, task


class Report(BaseModel):
    month: date


@dataclass
class Rendered:
    month: date
    pages: set[int]


async def render(payload: Report, ctx: TaskContext) -> Rendered:
    ctx.log(f"attempt {ctx.attempt} of {ctx.max_attempts}")
    for page in (1, 2):
        ctx.progress({"page": page})
    return Rendered(payload.month, {2})


rendering = define_task("reports-render", render)


async def test_the_output_is_what_both_stores_have() -> None:
    for payload in (Report(month=date(2026, 11, 1)), {"month": "2026-11-01"}):
        run = await run_task(rendering, payload, attempt=2)
        assert run.outcome == "completed"
        assert run.output == {"month": "2026-11-01", "pages": [2]}
        assert run.progress == [{"page": 1}, {"page": 2}]
        assert run.logs == ["attempt 2 of 3"]
        assert (run.error, run.exception, run.retry_in_ms, run.attempt) == (None, None, None, 2)


async def test_a_payload_that_does_not_validate_fails_its_run() -> None:
    run = await run_task(rendering, {"month": "never"})
    assert (run.outcome, run.retry_in_ms) == ("failed", None)
    assert run.error is not None
    assert "month" in run.error
    with pytest.raises(PayloadError):
        await run_task(task(hang), {"a": object()})


@pytest.mark.parametrize(
    ("error", "attempt", "expected"),
    [
        (OSError("down"), 1, ("retry", 1000, "down")),
        (OSError("down"), 2, ("retry", 2000, "down")),
        (OSError("down"), 3, ("failed", None, "down")),
        (UnrecoverableError("gone"), 1, ("failed", None, "gone")),
        (RetryLater(30), 1, ("retry_later", 30_000, None)),
        (RateLimited(60), 3, ("rate_limited", 60_000, None)),
        (DelayedError(), 1, ("retry", 1000, "the handler raised DelayedError without moving")),
        (SystemExit(3), 1, ("retry", 1000, "the handler raised SystemExit: 3")),
    ],
    ids=repr,
)
async def test_what_a_handler_raises(
    error: BaseException, attempt: int, expected: tuple[str, int | None, str | None]
) -> None:
    async def handler(payload: Any, ctx: TaskContext) -> None:
        raise error

    run = await run_task(define_task("q", handler), {}, attempt=attempt)
    assert (run.outcome, run.retry_in_ms, run.error) == expected


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ({"success": True, "output": 5, "duration": 7}, ("completed", 5, None)),
        ({"success": False, "reason": "no"}, ("retry", None, "no")),
        (2**70, ("completed", 2**70, None)),
        (float("nan"), ("completed", None, None)),
        (len, ("failed", None, "a value can't be stored: ")),
    ],
    ids=repr,
)
async def test_what_a_handler_returns(returned: object, expected: tuple[object, ...]) -> None:
    def handler(payload: Any, ctx: TaskContext) -> object:
        return returned

    run = await run_task(define_task("q", handler), {})
    error = run.error[: len(str(expected[2]))] if run.error else None
    assert (run.outcome, run.output, error) == expected


async def test_a_sync_handler_has_a_thread_with_the_attempt_around_it() -> None:
    entered: list[str] = []

    @contextmanager
    def around(ctx: TaskContext[Any]) -> Iterator[None]:
        entered.append(threading.current_thread().name)
        yield

    def handler(payload: Any, ctx: TaskContext) -> str:
        ctx.progress(50)
        return threading.current_thread().name

    run = await run_task(define_task("mails", handler, around=around), {})
    assert run.output == "handler of mails"
    assert entered == ["handler of mails"]
    assert run.progress == [50]


async def test_the_time_limit_holds_for_both_kinds() -> None:
    released = threading.Event()

    def block(payload: Any, ctx: TaskContext) -> None:
        released.wait()

    for limited in (task(hang, timeout_ms=20), define_task("q", block)):
        run = await run_task(limited, {}, timeout_ms=20)
        assert run.outcome == "retry"
        assert run.error == "the handler ran past its time limit of 20 ms"
    released.set()


async def test_a_cancelled_task_ends_an_async_handler_and_tells_a_sync_one() -> None:
    def loop(payload: Any, ctx: TaskContext) -> None:
        while True:
            ctx.raise_if_cancelled()
            time.sleep(0.001)

    async def finish(payload: Any, ctx: TaskContext) -> str:
        try:
            await ctx.wait_cancelled()
        except asyncio.CancelledError:
            assert ctx.cancelled
        return "finished all the same"

    for handler in (hang, loop, finish):
        run = await run_task(define_task("q", handler), {}, cancel_after=0.02)
        assert run.outcome == "cancelled"
        assert run.error == "the task is cancelled"


async def test_a_sync_handler_that_returns_all_the_same_has_completed() -> None:
    def finish(payload: Any, ctx: TaskContext) -> bool:
        while not ctx.cancelled:
            time.sleep(0.001)
        return ctx.cancelled

    run = await run_task(define_task("q", finish), {}, cancel_after=0.02)
    assert (run.outcome, run.output) == ("completed", True)


async def test_resources_are_given_or_those_of_the_lifespan() -> None:
    ended: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[str]:
        yield "real"
        ended.append("real")

    async def handler(payload: Any, ctx: TaskContext[str]) -> str:
        return ctx.resources

    greeting = define_task("q", handler, lifespan=lifespan)
    assert (await run_task(greeting, {}, resources="fake")).output == "fake"
    assert ended == []
    assert (await run_task(greeting, {})).output == "real"
    assert ended == ["real"]


async def test_a_lifespan_that_raises() -> None:
    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        raise OSError("no such host")
        yield

    with pytest.raises(TaskListError, match="no such host"):
        await run_task(define_task("q", hang, lifespan=lifespan), {})


async def test_what_the_context_tells() -> None:
    async def handler(payload: Any, ctx: TaskContext) -> list[object]:
        left = ctx.time_left()
        assert left is not None
        facts = [ctx.task_id, ctx.correlation_id, ctx.stopping, ctx.last_progress, left > 20]
        return [*facts, ctx.job.id, ctx.job.data, ctx.job.attemptsMade]

    run = await run_task(
        define_task("q", handler),
        {"a": 1},
        attempt=3,
        max_attempts=3,
        task_id="invoice-42",
        correlation_id="c1",
        last_progress={"page": 7},
        stopping=True,
    )
    facts = ["invoice-42", "c1", True, {"page": 7}, True]
    assert run.output == [*facts, "invoice-42", {"a": 1, "correlationId": "c1"}, 2]


async def test_the_job_takes_reports_and_says_what_it_lacks() -> None:
    async def reports(payload: Any, ctx: TaskContext) -> int:
        await ctx.job.updateProgress(50)
        return await ctx.job.log("a line")

    run = await run_task(define_task("q", reports), {})
    assert (run.output, run.progress, run.logs) == (1, [50], ["a line"])

    async def moves(payload: Any, ctx: TaskContext) -> None:
        await ctx.job.moveToDelayed(0, ctx.job.token)

    with pytest.raises(NeedsServersError, match=r"ctx\.job\.moveToDelayed .* worker_on_embedded"):
        await run_task(define_task("q", moves), {})


async def test_a_handler_for_processes_runs_here() -> None:
    async def handler(payload: Any, ctx: TaskContext[str]) -> str:
        return ctx.resources

    in_process = define_task("q", handler, TaskOptions(run_in="process"), lifespan=hang)  # type: ignore[arg-type]
    assert (await run_task(in_process, {}, resources="fake")).output == "fake"


async def test_cancelling_the_test_cancels_the_handler() -> None:
    ended = asyncio.Event()

    async def handler(payload: Any, ctx: TaskContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await run_task(define_task("q", handler), {})
    assert ended.is_set()


async def test_an_attempt_is_from_one_to_the_last() -> None:
    for attempt in (0, 4):
        with pytest.raises(ValueError, match="attempt must be from 1 to 3"):
            await run_task(rendering, {}, attempt=attempt)


async def test_the_handler_of_a_batch_task_gets_a_batch_of_one_job() -> None:
    sizes: list[int] = []

    async def store(items: Sequence[BatchItem[Report]], ctx: BatchContext) -> None:
        sizes.append(ctx.size)
        for item in items:
            item.ctx.log("seen")
            if item.payload.month.month == 1:
                item.complete({"stored": item.payload.month})
            elif item.payload.month.month == 2:
                item.retry_later(5)
            elif item.payload.month.month == 3:
                await asyncio.Event().wait()

    storing = define_task("reports-store", store, batch=BatchOptions())
    runs = [
        await run_task(storing, {"month": f"2026-0{month}-01"}, timeout_ms=50)
        for month in range(1, 5)
    ]
    assert [run.outcome for run in runs] == ["completed", "retry_later", "retry", "completed"]
    assert [run.output for run in runs] == [{"stored": "2026-01-01"}, None, None, None]
    assert runs[2].error == "the handler ran past its time limit of 50 ms"
    assert [run.logs for run in runs] == [["seen"]] * 4
    assert sizes == [1] * 4
