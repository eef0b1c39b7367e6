"""One call of a handler: run it within its time limit, and return whatever came of it."""

import asyncio
import inspect
import sys
import time
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import AsyncExitStack
from functools import partial
from typing import Any, Final, cast

import structlog

from autoflow_worker.broker.claim import Claim
from autoflow_worker.logs.attempt_fields import running_attempt
from autoflow_worker.process.forks import Forked, end_of_child
from autoflow_worker.tasks.batches import BatchContext
from autoflow_worker.tasks.context import TaskContext
from autoflow_worker.tasks.definition import TaskDefinition
from autoflow_worker.worker.runner import Outcome
from autoflow_worker.worker.threads import Call, HandlerExitError, HandlerThreads, NoThreadError
from autoflow_worker.worker.time_limit import Ended, Wait, end

log = structlog.get_logger(__name__)

UNWIND_PATIENCE: Final = 0.5
"""Seconds that a cancelled handler has to clean up before it is left behind."""

HandlerContext = TaskContext[Any] | BatchContext[Any]
"""What a handler gets besides its payload, or its items."""

# An eager task that waits for nothing has ended when it is made.
_EAGER: Final[dict[str, Any]] = {"eager_start": True} if sys.version_info >= (3, 12) else {}

# asyncio holds only weak references: a handler that is left behind must not be collected.
_strays: set[asyncio.Future[Any]] = set()


class HandlerCancelledError(Exception):
    """The handler ended with a CancelledError of its own making."""


class LoopRunner:
    """Runs `async def` handlers in the event loop."""

    has_room = True
    interrupts = True

    def __init__(self, task: TaskDefinition[Any]) -> None:
        self._task = task

    async def room(self) -> None:
        """Return at once."""

    def payload(self, claim: Claim) -> Any:
        """Return the validated payload; see `Runner`."""
        return self._task.parse_payload(claim.data)

    async def run(self, payload: Any, context: HandlerContext, wait: Wait) -> Outcome:
        """Call the handler once, and wait for its end; see `Runner`.

        A handler that does not end when it is cancelled is left behind after `UNWIND_PATIENCE`: its
        slot goes on, and its result is dropped.
        """
        started = time.perf_counter()
        task = self._task
        if task.around is None and task.around_async is None:
            call = cast(Coroutine[Any, Any, Any], task.handler(payload, context))
        else:
            call = call_within(task, payload, context)
        handler = _start(call, wait.ended, context)
        error: BaseException | None = None
        try:
            if not handler.done():
                error = await wait.ended
        except asyncio.CancelledError:
            await _unwind(handler, context)
            if not _returned(handler):
                raise
            # Finished work is not done again.
        if error is not None:
            await _unwind(handler, context)
        return _outcome(handler, error, started)

    async def open(self, timeout: float) -> None:
        """Return at once."""

    def stop(self) -> None:
        """Do nothing: contexts ask the fetcher."""

    async def close(self, timeout: float) -> None:
        """Return at once."""

    def deaths(self) -> Sequence[asyncio.Task[Any]]:
        return ()


class ThreadRunner(LoopRunner):
    """Runs plain `def` handlers in threads, and what they return in the loop if it is awaitable.

    Args:
        concurrency: calls of the handler at once.
    """

    interrupts = False

    def __init__(self, task: TaskDefinition[Any], concurrency: int) -> None:
        super().__init__(task)
        self._threads = HandlerThreads(task.queue_name, limit=concurrency)
        self._watch = asyncio.get_running_loop().create_task(
            self._threads.watch(), name=f"the threads of {task.queue_name}"
        )

    @property
    def has_room(self) -> bool:  # type: ignore[override]
        return self._threads.has_room

    async def room(self) -> None:
        """Wait until a thread that was left behind has ended."""
        await self._threads.room()

    async def run(self, payload: Any, context: HandlerContext, wait: Wait) -> Outcome:
        """Call the handler once, and wait for its end; see `Runner`.

        A thread that has not ended `UNWIND_PATIENCE` after it should is left behind.

        Raises:
            NoThreadError: the machine gives no thread; the handler was not called.
        """
        started = time.perf_counter()
        call = self._threads.run(partial(call_plain, self._task, payload, context), wait.ended)
        handler: asyncio.Future[Any] = call.result
        error: BaseException | None = None
        try:
            error = await wait.ended
            if error is None and (rest := _rest_of(handler)) is not None:
                # A plain function around an async one has only now returned what is to be awaited.
                wait.go_on()
                handler = _start(rest, wait.ended, context)
                error = await wait.ended
        except asyncio.CancelledError:
            await self._give_up(call, handler, context)
            if not _returned(handler) or (_rest_of(handler) is not None):
                raise
            # Finished work is not done again.
        if error is not None:
            if self._threads.withdraw(call):
                raise NoThreadError("no thread came free within the time limit")
            await self._give_up(call, handler, context)
        return _outcome(handler, error, started)

    async def _give_up(
        self, call: Call, handler: asyncio.Future[Any], context: HandlerContext
    ) -> None:
        if not self._threads.withdraw(call):
            await _unwind(handler, context)
            self._threads.leave_behind(call, context.task_id)

    async def close(self, timeout: float) -> None:
        """End the threads that have nothing to run."""
        self._threads.close()
        self._watch.cancel()
        await asyncio.wait({self._watch}, timeout=timeout)

    def deaths(self) -> Sequence[asyncio.Task[Any]]:
        return [self._watch]


def _returned(handler: asyncio.Future[Any]) -> bool:
    return handler.done() and not handler.cancelled() and handler.exception() is None


def _outcome(handler: asyncio.Future[Any], error: BaseException | None, started: float) -> Outcome:
    """Return what a handler came to that has ended, or that was to be ended for an error."""
    if error is None:
        if handler.cancelled():
            error = HandlerCancelledError("the handler was cancelled from inside")
        else:
            error = handler.exception()
    value = None if error is not None else handler.result()
    return Outcome(value, error, round((time.perf_counter() - started) * 1000))


def task_name(queue_name: str, task_id: str) -> str:
    """Return the name of the asyncio task in which the handler of a job runs."""
    return f"job {task_id} of {queue_name}"


def call_plain(task: TaskDefinition[Any], payload: Any, context: HandlerContext) -> object:
    """Call a sync handler, in its thread."""
    running_attempt.set(context)
    if task.around is None:
        return task.handler(payload, context)
    with task.around(context):
        return task.handler(payload, context)


async def call_within(task: TaskDefinition[Any], payload: Any, context: HandlerContext) -> Any:
    """Call an async handler inside of its task's context managers."""
    async with AsyncExitStack() as stack:
        if task.around is not None:
            stack.enter_context(task.around(context))
        if task.around_async is not None:
            await stack.enter_async_context(task.around_async(context))
        return await cast(Coroutine[Any, Any, Any], task.handler(payload, context))


def _start(call: Awaitable[Any], ended: Ended, context: HandlerContext) -> asyncio.Task[Any]:
    handler = asyncio.Task(
        _contain(call, ended, context),
        loop=asyncio.get_running_loop(),
        name=task_name(context.queue_name, context.task_id),
        **_EAGER,
    )
    if Forked.here:
        end_of_child()
    if not handler.done():
        # If the task is cancelled before its first step, `_contain` never runs; this callback
        # reports the end.
        handler.add_done_callback(partial(_end_of, ended))
    return handler


def _end_of(ended: Ended, _handler: asyncio.Future[Any]) -> None:
    end(ended, None)


def _rest_of(handler: asyncio.Future[Any]) -> Awaitable[Any] | None:
    """Return what is still to be awaited of a handler that is no `async def`."""
    if handler.cancelled() or handler.exception() is not None:
        return None
    value = handler.result()
    return value if inspect.isawaitable(value) else None


async def _unwind(handler: asyncio.Future[Any], context: HandlerContext) -> None:
    """Cancel the handler, and leave it behind if it has not ended after `UNWIND_PATIENCE`."""
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
    """Retrieve a result that nobody needs, so that Python does not warn of it."""
    rest = _rest_of(handler)
    if inspect.iscoroutine(rest):
        rest.close()


async def _contain(call: Awaitable[Any], ended: Ended, context: HandlerContext) -> Any:
    """Keep `SystemExit` and its like from ending the event loop."""
    running_attempt.set(context)  # The asyncio task has a context of its own.
    try:
        return await call
    except (Exception, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise HandlerExitError(error) from error
    finally:
        # A done callback would run one turn of the event loop later.
        end(ended, None)
