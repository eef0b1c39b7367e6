"""One attempt: run the handler, within its time limit, and tell whatever came of it."""

import asyncio
import contextvars
import inspect
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, cast

import structlog

from autoflow_worker.task import TaskContext, TaskDefinition

log = structlog.get_logger(__name__)

UNWIND_PATIENCE: Final = 0.5
"""Seconds that a cancelled handler has for its own cleaning up before it is left behind."""

# What was left behind must not be collected while it runs; asyncio holds only weak references.
_strays: set[asyncio.Future[Any]] = set()


class TimeLimitError(Exception):
    """The handler ran past its time limit."""


class HandlerCancelledError(Exception):
    """The handler ended with a CancelledError of its own making."""


class HandlerExitError(Exception):
    """The handler tried to end the process."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an attempt came to: a value, or an error.

    Attributes:
        value: what the handler returned; None if `error` is set.
        error: what it raised, with its traceback.
        duration_ms: from the handler's start to its end.
    """

    value: Any
    error: BaseException | None
    duration_ms: int


async def execute(task: TaskDefinition[Any], payload: Any, context: TaskContext) -> Outcome:
    """Run one attempt to its end.

    Cancelling this cancels the handler. A handler that neither ends nor lets itself be cancelled
    is left behind after `UNWIND_PATIENCE`: nobody waits for it any more, its result is dropped.

    Raises:
        asyncio.CancelledError: this was cancelled, and the handler did not finish all the same.
    """
    loop = asyncio.get_running_loop()
    started, since = time.perf_counter(), loop.time()
    handler: asyncio.Future[Any]
    error: BaseException | None
    if task.is_async:
        call = cast(Coroutine[Any, Any, Any], task.handler(payload, context))
        handler = loop.create_task(_contain(call))
    else:
        handler = _in_thread(lambda: task.handler(payload, context), context.queue_name)
    try:
        error = await _finish(handler, task.options.timeout_ms, since)
        if error is None and not task.is_async and (rest := _rest_of(handler)) is not None:
            # A plain function around an async one has only now given what is to be waited for.
            handler = loop.create_task(_contain(rest))
            error = await _finish(handler, task.options.timeout_ms, since)
    except asyncio.CancelledError:
        await _unwind(handler, context)
        if handler.cancelled() or not handler.done() or handler.exception() is not None:
            raise
        if not task.is_async and _rest_of(handler) is not None:
            raise
        error = None  # It had finished after all, and finished work is not done again.
    if error is not None:
        await _unwind(handler, context)
    elif handler.cancelled():
        error = HandlerCancelledError("the handler was cancelled from inside")
    else:
        error = handler.exception()
    value = None if error is not None else handler.result()
    return Outcome(value, error, round((time.perf_counter() - started) * 1000))


async def _finish(
    handler: asyncio.Future[Any], timeout_ms: int | None, since: float
) -> TimeLimitError | None:
    """Wait for the handler's end or its time limit, whichever comes first.

    A future and a timer do what `asyncio.wait` does at a fraction of its cost.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[TimeLimitError | None] = loop.create_future()

    def end(error: TimeLimitError | None) -> None:
        if not ended.done():
            ended.set_result(error)

    handler.add_done_callback(lambda _: end(None))
    if timeout_ms is None:
        return await ended
    limit = TimeLimitError(f"the handler ran past its time limit of {timeout_ms} ms")
    timer = loop.call_at(since + timeout_ms / 1000, end, limit)
    try:
        return await ended
    finally:
        timer.cancel()


def _rest_of(handler: asyncio.Future[Any]) -> Awaitable[Any] | None:
    """What is still to be awaited of a handler that is no `async def`."""
    if handler.cancelled() or handler.exception() is not None:
        return None
    value = handler.result()
    return value if inspect.isawaitable(value) else None


async def _unwind(handler: asyncio.Future[Any], context: TaskContext) -> None:
    """Cancel the handler and give it a moment; leave it behind if it stays."""
    if isinstance(handler, asyncio.Task):
        handler.cancel()
    await asyncio.wait({handler}, timeout=UNWIND_PATIENCE)
    if handler.done():
        _discard(handler)
    else:
        log.error("handler_left_behind", task_id=context.task_id, queue=context.queue_name)
        _strays.add(handler)
        handler.add_done_callback(_forget)


def _forget(handler: asyncio.Future[Any]) -> None:
    _strays.discard(handler)
    _discard(handler)


def _discard(handler: asyncio.Future[Any]) -> None:
    """Look at what nobody wants any more, so that Python does not complain that nobody did."""
    rest = _rest_of(handler)
    if inspect.iscoroutine(rest):
        rest.close()


async def _contain(call: Awaitable[Any]) -> Any:
    """Keep `SystemExit` and its like from ending the event loop."""
    try:
        return await call
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise HandlerExitError(f"the handler raised {type(error).__name__}: {error}") from error


def _in_thread(call: Callable[[], Any], name: str) -> asyncio.Future[Any]:
    """Run a handler that is not async in a thread of its own.

    The thread is a daemon: it can't be interrupted, and must not hold up the process's exit.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()
    context = contextvars.copy_context()

    def deliver(value: Any, error: BaseException | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(value)
        elif isinstance(error, Exception) and not isinstance(error, StopIteration):
            future.set_exception(error)
        else:
            exit_error = HandlerExitError(f"the handler raised {type(error).__name__}: {error}")
            exit_error.__cause__ = error
            future.set_exception(exit_error)

    def body() -> None:
        value, error = None, None
        try:
            value = context.run(call)
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(deliver, value, error)
        except RuntimeError:  # The loop is closed: the worker has gone on without this thread.
            return

    threading.Thread(target=body, name=f"handler of {name}", daemon=True).start()
    return future
