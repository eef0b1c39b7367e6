"""One attempt: run the handler, within its time limit, and tell whatever came of it."""

import asyncio
import inspect
import math
import sys
import time
from collections.abc import Awaitable, Coroutine
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

import structlog

from autoflow_worker.process.forks import Forked, end_of_child
from autoflow_worker.tasks.definition import TaskContext, TaskDefinition
from autoflow_worker.worker.threads import HandlerExitError, HandlerThreads

log = structlog.get_logger(__name__)

UNWIND_PATIENCE: Final = 0.5
"""Seconds that a cancelled handler has for its own cleaning up before it is left behind."""

# What was left behind must not be collected while it runs; asyncio holds only weak references.
_strays: set[asyncio.Future[Any]] = set()


class TimeLimitError(Exception):
    """The handler ran past its time limit."""


class HandlerCancelledError(Exception):
    """The handler ended with a CancelledError of its own making."""


@dataclass(slots=True)
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


@dataclass(slots=True, eq=False)
class _Wait:
    """An attempt that is waited for until the future is done, or the time is over."""

    ended: asyncio.Future[TimeLimitError | None]
    deadline: float


class TimeLimit:
    """The time limit of one task's attempts.

    They all have the same, so they run out of time in the order in which they started, and one
    timer does for all of them.

    Args:
        timeout_ms: of one attempt; None: no limit.
    """

    def __init__(self, timeout_ms: int | None) -> None:
        self._timeout_ms = timeout_ms
        self._waits: dict[_Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, ended: asyncio.Future[TimeLimitError | None]) -> _Wait:
        """An attempt starts; the future gets a `TimeLimitError` if its time is over before."""
        if self._timeout_ms is None:
            return _Wait(ended, math.inf)
        loop = ended.get_loop()
        wait = _Wait(ended, loop.time() + self._timeout_ms / 1000)
        self._waits[wait] = None
        if self._timer is None:
            self._timer = loop.call_at(wait.deadline, self._expire)
        return wait

    def remove(self, wait: _Wait) -> None:
        """An attempt has ended."""
        self._waits.pop(wait, None)

    def _expire(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._waits:
            oldest = next(iter(self._waits))
            if oldest.deadline > loop.time():
                self._timer = loop.call_at(oldest.deadline, self._expire)
                return
            del self._waits[oldest]
            words = f"the handler ran past its time limit of {self._timeout_ms} ms"
            _end(oldest.ended, TimeLimitError(words))


async def execute(
    task: TaskDefinition[Any],
    payload: Any,
    context: TaskContext,
    limit: TimeLimit,
    threads: HandlerThreads,
) -> Outcome:
    """Run one attempt to its end.

    Cancelling this cancels the handler. A handler that neither ends nor lets itself be cancelled
    is left behind after `UNWIND_PATIENCE`: nobody waits for it any more, its result is dropped.

    Raises:
        asyncio.CancelledError: this was cancelled, and the handler did not finish all the same.
        NoThreadError: the machine gives no thread; the handler was not called.
    """
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    ended: asyncio.Future[TimeLimitError | None] = loop.create_future()
    handler: asyncio.Future[Any]
    error: BaseException | None = None
    if task.is_async:
        call = cast(Coroutine[Any, Any, Any], task.handler(payload, context))
        handler = _start(call, ended, context.queue_name)
    else:
        handler = threads.run(lambda: task.handler(payload, context))
        handler.add_done_callback(partial(_end_of, ended))
    wait = limit.add(ended)
    try:
        if not handler.done():
            error = await wait.ended
        if not task.is_async and error is None and (rest := _rest_of(handler)) is not None:
            # A plain function around an async one has only now given what is to be waited for.
            wait.ended = loop.create_future()
            handler = _start(rest, wait.ended, context.queue_name)
            error = await wait.ended
    except asyncio.CancelledError:
        await _unwind(handler, context, threads)
        if handler.cancelled() or not handler.done() or handler.exception() is not None:
            raise
        if not task.is_async and _rest_of(handler) is not None:
            raise
        error = None  # It had finished after all, and finished work is not done again.
    finally:
        limit.remove(wait)
    if error is not None:
        await _unwind(handler, context, threads)
    elif handler.cancelled():
        error = HandlerCancelledError("the handler was cancelled from inside")
    else:
        error = handler.exception()
    value = None if error is not None else handler.result()
    return Outcome(value, error, round((time.perf_counter() - started) * 1000))


def _start(
    call: Awaitable[Any], ended: asyncio.Future[TimeLimitError | None], name: str
) -> asyncio.Task[Any]:
    handler = _new_task(_contain(call, ended), name)
    if not handler.done():
        # If the task is cancelled before its first step, `_contain` never runs.
        handler.add_done_callback(partial(_end_of, ended))
    return handler


if sys.version_info >= (3, 12):

    def _new_task(call: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """A handler that does not wait for anything has ended when this returns."""
        loop = asyncio.get_running_loop()
        handler = asyncio.Task(call, loop=loop, name=name, eager_start=True)
        if Forked.here:
            end_of_child()
        return handler

else:

    def _new_task(call: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        return asyncio.Task(call, loop=asyncio.get_running_loop(), name=name)


def _end(ended: asyncio.Future[TimeLimitError | None], error: TimeLimitError | None) -> None:
    if not ended.done():
        ended.set_result(error)


def _end_of(ended: asyncio.Future[TimeLimitError | None], _handler: asyncio.Future[Any]) -> None:
    _end(ended, None)


def _rest_of(handler: asyncio.Future[Any]) -> Awaitable[Any] | None:
    """What is still to be awaited of a handler that is no `async def`."""
    if handler.cancelled() or handler.exception() is not None:
        return None
    value = handler.result()
    return value if inspect.isawaitable(value) else None


async def _unwind(
    handler: asyncio.Future[Any], context: TaskContext, threads: HandlerThreads
) -> None:
    """Cancel the handler and give it a moment; leave it behind if it stays."""
    if isinstance(handler, asyncio.Task):
        handler.cancel()
    await asyncio.wait({handler}, timeout=UNWIND_PATIENCE)
    if handler.done():
        _discard(handler)
    else:
        log.error("handler_left_behind", task_id=context.task_id, queue=context.queue_name)
        threads.leave_behind(handler, context.task_id)
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


async def _contain(call: Awaitable[Any], ended: asyncio.Future[TimeLimitError | None]) -> Any:
    """Keep `SystemExit` and its like from ending the event loop."""
    try:
        return await call
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise HandlerExitError(f"the handler raised {type(error).__name__}: {error}") from error
    finally:
        # A done callback would tell it one turn of the event loop later.
        _end(ended, None)
