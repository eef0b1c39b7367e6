"""A `def` around an `async def`, as decorators make them: what it returns is to be awaited."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from autoflow_worker import TaskContext, TaskOptions, define_task
from autoflow_worker.worker.handler import HandlerCancelledError
from autoflow_worker.worker.runner import Outcome
from autoflow_worker.worker.runners import runner_for
from autoflow_worker.worker.threads import HandlerExitError
from autoflow_worker.worker.time_limit import TimeLimit, TimeLimitError

Payload = dict[str, Any]
Handler = Callable[[Payload, TaskContext], object]
AsyncHandler = Callable[[Payload, TaskContext], Coroutine[Any, Any, object]]


def wrapped(handler: AsyncHandler) -> Handler:
    def wrapper(payload: Payload, ctx: TaskContext) -> object:
        return handler(payload, ctx)

    return wrapper


async def run(handler: Handler, timeout_ms: int | None = None) -> Outcome:
    task = define_task("q", handler, TaskOptions(timeout_ms=timeout_ms))
    assert not task.is_async
    context = TaskContext(task_id="t", correlation_id="c", queue_name="q")
    limit = TimeLimit(timeout_ms)
    return await runner_for(task, 1, limit, "").run({"n": 1}, context, limit.start())


async def run_async(handler: AsyncHandler) -> Outcome:
    task = define_task("q", handler, TaskOptions(timeout_ms=None))
    context = TaskContext(task_id="t", correlation_id="c", queue_name="q")
    limit = TimeLimit(None)
    return await runner_for(task, 1, limit, "").run({"n": 1}, context, limit.start())


async def test_what_it_returns_is_awaited_on_the_loop() -> None:
    loop = asyncio.get_running_loop()

    async def handler(payload: Payload, ctx: TaskContext) -> object:
        assert asyncio.get_running_loop() is loop
        return payload["n"]

    outcome = await run(wrapped(handler))
    assert (outcome.value, outcome.error) == (1, None)


@pytest.mark.parametrize(
    ("raised", "kind"),
    [
        (ValueError("no"), ValueError),
        (asyncio.CancelledError(), HandlerCancelledError),
        (SystemExit(3), HandlerExitError),
    ],
)
async def test_what_it_raises_is_the_outcome(raised: BaseException, kind: type) -> None:
    async def handler(payload: Payload, ctx: TaskContext) -> None:
        raise raised

    assert type((await run(wrapped(handler))).error) is kind


async def test_the_time_limit_holds_for_all_of_it() -> None:
    ended: list[str] = []

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    outcome = await run(wrapped(handler), timeout_ms=20)
    assert isinstance(outcome.error, TimeLimitError)
    assert ended == ["cleaned up"]


async def test_it_is_cancelled_as_an_async_one() -> None:
    started = asyncio.Event()
    ended: list[str] = []

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    running = asyncio.create_task(run(wrapped(handler)))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended == ["cleaned up"]


async def test_what_comes_too_late_to_be_awaited_is_no_result() -> None:
    started, go_on = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        pytest.fail("it must not run")

    def late(payload: Payload, ctx: TaskContext) -> object:
        loop.call_soon_threadsafe(started.set)
        asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
        return handler(payload, ctx)

    running = asyncio.create_task(run(late))
    await started.wait()
    running.cancel()
    loop.call_soon(go_on.set)
    with pytest.raises(asyncio.CancelledError):
        await running
    gc.collect()  # A coroutine that nobody has closed would complain here.


async def test_one_timer_ends_each_attempt_at_its_own_time() -> None:
    loop = asyncio.get_running_loop()
    limit = TimeLimit(30)
    late, quick = limit.start(), limit.start()
    limit.remove(quick)
    assert isinstance(await late.ended, TimeLimitError)
    began = loop.time()
    assert isinstance(await limit.start().ended, TimeLimitError)
    assert loop.time() - began >= 0.03
    assert not quick.ended.done()


async def test_a_limit_between_two_parts_of_a_handler_ends_the_second() -> None:
    wait = TimeLimit(1).start()
    wait.ended.set_result(None)  # The first part returned, and its slot has not noticed yet.
    await asyncio.sleep(0.01)
    wait.go_on()
    assert isinstance(await wait.ended, TimeLimitError)


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")
async def test_a_handler_that_is_cancelled_before_it_runs_is_no_wait_without_end() -> None:
    others = asyncio.all_tasks()

    async def handler(payload: Payload, ctx: TaskContext) -> None:
        await asyncio.Event().wait()

    async def cancel_what_is_new() -> None:
        for task in asyncio.all_tasks() - others - {running, asyncio.current_task()}:
            task.cancel()

    running = asyncio.create_task(run_async(handler))
    canceller = asyncio.create_task(cancel_what_is_new())
    assert isinstance((await running).error, HandlerCancelledError)
    await canceller
