"""How jobs are gathered into batches, and what each job's attempt gets of its batch."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from structlog.testing import capture_logs

from autoflow_worker import (
    BatchContext,
    BatchEndedError,
    BatchItem,
    BatchOptions,
    TaskCancelledError,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    define_task,
)
from autoflow_worker.tasks.context import NoAttempt
from autoflow_worker.worker.runner import Outcome, Runner
from autoflow_worker.worker.runners import runner_for
from autoflow_worker.worker.threads import NoThreadError
from autoflow_worker.worker.time_limit import TimeLimit, TimeLimitError
from tests.support.until import until

FOREVER = 60_000

Items = Sequence[BatchItem[Any]]


class Cancelled(NoAttempt):
    is_cancelled = True


def runner_of(task: TaskDefinition[Any]) -> Runner:
    return runner_for(task, task.options.concurrency or 1, TimeLimit(None), "no:module")


class Batches:
    """A runner of batches, and those that its handler was called with; each waits for the gate."""

    def __init__(
        self,
        *,
        size: int = 3,
        wait_ms: int = FOREVER,
        concurrency: int = 1,
        body: Callable[[Items], object] | None = None,
        timeout_ms: int | None = None,
        **given: Any,
    ) -> None:
        self.begun: list[list[Any]] = []
        self.gate = asyncio.Event()
        self._body = body
        batch = BatchOptions(size=size, wait_ms=wait_ms)
        options = TaskOptions(timeout_ms=timeout_ms, concurrency=concurrency)
        self.runner = runner_of(define_task("q", self._handler, options, batch=batch, **given))

    async def _handler(self, items: Items, ctx: BatchContext) -> None:
        self.begun.append([item.payload for item in items])
        if self._body is not None:
            result: Any = self._body(items)
            return result  # type: ignore[no-any-return]
        await self.gate.wait()
        return None

    def add(self, *payloads: Any, running: NoAttempt | None = None) -> list[asyncio.Task[Outcome]]:
        return [
            asyncio.create_task(
                self.runner.run(payload, context(payload, running), TimeLimit(None).start())
            )
            for payload in payloads
        ]


def context(payload: object, running: NoAttempt | None = None) -> TaskContext:
    return TaskContext(task_id=f"{payload}", correlation_id="c", queue_name="q", running=running)


def each(items: Items) -> Iterator[BatchItem[Any]]:
    """The items by their payloads, which are a, b, c."""
    return iter(sorted(items, key=lambda item: str(item.payload)))


async def turns() -> None:
    """Let everything go on that waits for nothing."""
    for _ in range(10):
        await asyncio.sleep(0)


# -- gathering -----------------------------------------------------------------------------------


async def test_a_full_batch_begins_at_once() -> None:
    batches = Batches()
    jobs = batches.add(1, 2)
    await turns()
    assert batches.begun == []
    jobs += batches.add(3)
    await turns()
    assert batches.begun == [[1, 2, 3]]
    batches.gate.set()
    assert [(await job).value for job in jobs] == [None] * 3


async def test_the_first_job_waits_no_longer_than_it_is_to() -> None:
    batches = Batches(wait_ms=20)
    jobs = batches.add(1, 2)
    await until(lambda: batches.begun)
    assert batches.begun == [[1, 2]]
    batches.gate.set()
    await asyncio.gather(*jobs)
    # The timer of the next batch is its own.
    [job] = batches.add(3)
    await job
    assert batches.begun == [[1, 2], [3]]


async def test_jobs_that_find_no_place_are_the_next_batches() -> None:
    batches = Batches(concurrency=2, wait_ms=0)
    jobs: list[Any] = []
    for number in range(2):
        jobs += batches.add(number)
        await turns()
    assert not batches.runner.has_room
    room = asyncio.create_task(batches.runner.room())
    jobs += batches.add(*range(2, 7))
    await turns()
    assert batches.begun == [[0], [1]]
    assert not room.done()
    batches.gate.set()
    await asyncio.gather(*jobs)
    await room
    assert batches.begun == [[0], [1], [2, 3, 4], [5, 6]]
    assert batches.runner.has_room


async def test_a_worker_that_stops_waits_for_no_more_jobs() -> None:
    batches = Batches()
    jobs = batches.add(1)
    await turns()
    batches.runner.stop()
    jobs += batches.add(2)
    await turns()
    assert batches.begun == [[1]]
    batches.gate.set()
    await asyncio.gather(*jobs)
    assert batches.begun == [[1], [2]]


async def test_jobs_that_were_cancelled_while_they_waited_are_left_out() -> None:
    batches = Batches(wait_ms=20)
    batches.gate.set()
    gone = batches.add("gone", running=Cancelled())
    [kept] = batches.add("kept")
    [outcome] = await asyncio.gather(*gone)
    assert isinstance(outcome.error, TaskCancelledError)
    assert (await kept).error is None
    assert batches.begun == [["kept"]]
    await asyncio.gather(*batches.add("all", "of them", running=Cancelled()))
    assert batches.begun == [["kept"]]
    assert batches.runner.has_room


# -- outcomes ------------------------------------------------------------------------------------


async def test_what_the_handler_raises_fails_what_it_has_not_settled() -> None:
    def body(items: Items) -> None:
        first, second, _ = each(items)
        first.complete("done")
        second.fail(KeyError("x"))
        raise ValueError("all of them")

    a, b, c = await asyncio.gather(*Batches(body=body).add("a", "b", "c"))
    assert (a.value, a.error) == ("done", None)
    assert repr(b.error) == "KeyError('x')"
    assert repr(c.error) == "ValueError('all of them')"


async def test_settled_jobs_go_on_while_the_handler_runs() -> None:
    """All but the last one, which keeps a slot for the handler."""
    gate = asyncio.Event()

    async def handler(items: Items, ctx: BatchContext) -> None:
        for item in items:
            item.complete(item.payload)
        await gate.wait()

    task = define_task("q", handler, batch=BatchOptions(size=3))
    runner = runner_of(task)
    jobs = [
        asyncio.create_task(runner.run(name, context(name), TimeLimit(None).start()))
        for name in "abc"
    ]
    done, [last] = await asyncio.wait(jobs, return_when=asyncio.FIRST_COMPLETED)
    assert len(done) == 2
    assert not runner.has_room
    gate.set()
    assert {job.result().value for job in done} | {(await last).value} == set("abc")


async def test_a_cancelled_task_is_completed_only_by_a_word_of_the_handler() -> None:
    running = [NoAttempt() for _ in "abc"]

    def body(items: Items) -> None:
        first, second, third = each(items)
        for attempt in running[:2]:
            attempt.is_cancelled = True
        assert [first.ctx.cancelled, second.ctx.cancelled, third.ctx.cancelled] == [1, 1, 0]
        first.complete("finished all the same")

    batches = Batches(body=body)
    [a], [b], [c] = (
        batches.add(name, running=attempt) for name, attempt in zip("abc", running, strict=True)
    )
    assert (await a).value == "finished all the same"
    assert isinstance((await b).error, TaskCancelledError)
    assert (await c).error is None


async def test_the_time_limit_holds_for_the_whole_call() -> None:
    lefts: list[Any] = []

    async def handler(items: Items, ctx: BatchContext) -> None:
        lefts.append(ctx.time_left())
        next(each(items)).complete("in time")
        await asyncio.Event().wait()

    task = define_task("q", handler, TaskOptions(timeout_ms=20), batch=BatchOptions(size=2))
    runner = runner_of(task)
    a, b = await asyncio.gather(
        *(runner.run(name, context(name), TimeLimit(None).start()) for name in "ab")
    )
    assert (a.value, a.error) == ("in time", None)
    assert isinstance(b.error, TimeLimitError)


async def test_nothing_is_settled_after_the_end() -> None:
    kept: list[BatchItem[Any]] = []
    await asyncio.gather(*Batches(size=2, body=kept.extend).add("a", "b"))
    with pytest.raises(BatchEndedError, match="the job a has ended"):
        kept[0].complete(1)


async def test_errors_and_results_that_no_job_gets_are_told() -> None:
    def body(items: Items) -> str:
        if (item := items[0]).payload == "result":
            return "the result of all of them"
        item.complete(1)
        raise ValueError("too late")

    batches = Batches(size=1, body=body)
    with capture_logs() as logs:
        [ignored, lost] = await asyncio.gather(*batches.add("result", "error"))
    assert (ignored.value, lost.value, lost.error) == (None, 1, None)
    assert {(line["event"], line["task_id"]) for line in logs} == {
        ("batch_result_ignored", "result"),
        ("batch_failed_after_its_items", "error"),
    }


async def test_the_context_managers_are_around_the_whole_batch() -> None:
    steps: list[object] = []

    @contextlib.contextmanager
    def around(ctx: BatchContext[Any]) -> Iterator[None]:
        steps.append(ctx.size)
        yield
        steps.append("left")

    body = steps.append
    await asyncio.gather(*Batches(size=2, around=around, body=body).add("a", "b"))
    assert [steps[0], steps[2]] == [2, "left"]


async def test_a_machine_without_threads_is_nobodys_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def handler(items: Items, ctx: BatchContext) -> None:
        raise AssertionError("it must not run")

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    task = define_task("q", handler, batch=BatchOptions(size=2))
    runner = runner_of(task)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        jobs = [runner.run(name, context(name), TimeLimit(None).start()) for name in "ab"]
        for raised in await asyncio.gather(*jobs, return_exceptions=True):
            assert isinstance(raised, NoThreadError)


async def test_a_handler_in_a_thread_settles_its_items() -> None:
    begun = threading.Event()
    go_on = threading.Event()

    def handler(items: Items, ctx: BatchContext) -> None:
        first, second, _ = each(items)
        first.complete("from a thread")
        second.fail(KeyError("x"))
        begun.set()
        go_on.wait()

    task = define_task("q", handler, batch=BatchOptions(size=3))
    runner = runner_of(task)
    a, b, c = (
        asyncio.create_task(runner.run(name, context(name), TimeLimit(None).start()))
        for name in "abc"
    )
    try:
        assert (await a).value == "from a thread"
        assert repr((await b).error) == "KeyError('x')"
        assert not c.done()
    finally:
        go_on.set()
    assert (await c).error is None


# -- cut off -------------------------------------------------------------------------------------


async def test_cancelled_attempts_cancel_their_batch_and_settled_ones_count() -> None:
    ended: list[str] = []

    async def handler(items: Items, ctx: BatchContext) -> None:
        first, second, _ = each(items)
        first.complete("before")
        try:
            await asyncio.Event().wait()
        finally:
            second.complete("while it is cancelled")
            ended.append("cleaned up")

    task = define_task("q", handler, batch=BatchOptions(size=3))
    runner = runner_of(task)
    a, b, c = (
        asyncio.create_task(runner.run(name, context(name), TimeLimit(None).start()))
        for name in "abc"
    )
    assert (await a).value == "before"
    for job in (b, c):
        job.cancel()
    assert (await b).value == "while it is cancelled"
    with pytest.raises(asyncio.CancelledError):
        await c
    assert ended == ["cleaned up"]
    assert runner.has_room
    await runner.close(1)


async def test_a_batch_that_returns_although_it_is_cancelled_has_ended_well() -> None:
    async def handler(items: Items, ctx: BatchContext) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()

    task = define_task("q", handler, batch=BatchOptions(size=2))
    runner = runner_of(task)
    jobs = [
        asyncio.create_task(runner.run(name, context(name), TimeLimit(None).start()))
        for name in "ab"
    ]
    await turns()
    for job in jobs:
        job.cancel()
    assert [outcome.error for outcome in await asyncio.gather(*jobs)] == [None, None]


async def test_a_job_that_is_cancelled_while_it_waits_is_in_no_batch() -> None:
    batches = Batches(size=2)
    [gone] = batches.add("gone")
    await turns()
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    jobs = batches.add("a", "b")
    await turns()
    assert batches.begun == [["a", "b"]]
    batches.gate.set()
    await asyncio.gather(*jobs)
