"""Threads for handlers that are not async: a pool for each task."""

import asyncio
import contextvars
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

import structlog

from autoflow_worker.errors import PartDiedError
from autoflow_worker.worker.time_limit import Ended, end

log = structlog.get_logger(__name__)

THREAD_NAME: Final = "handler of "
"""How the name of a thread begins while it runs a handler; `process.leaving` knows it by that."""

IDLE_NAME: Final = "idle thread of "

IDLE_PATIENCE: Final = 60.0
"""Seconds after which a thread that has nothing to run ends."""

STUCK_PATIENCE: Final = 300.0
"""Seconds for which a task may have no thread that is not stuck; then the service ends."""

JOIN_PATIENCE: Final = 0.2  # seconds for a thread that has nothing to run to end

MAX_STACK: Final = 12  # frames of a stuck handler in the log, the innermost


class HandlerExitError(Exception):
    """The handler tried to end the process, as by `SystemExit`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the handler raised {type(error).__name__}: {error}")
        self.__cause__ = error


class NoThreadError(Exception):
    """The machine gives no thread for a handler, which was not called."""


@dataclass(slots=True, eq=False)
class Call:
    """A call of a handler, which waits for a thread or has one.

    Attributes:
        result: what the handler returns or raises.
        ended: is told of its end as well, one turn of the event loop earlier.
    """

    function: Callable[[], Any]
    context: contextvars.Context
    result: asyncio.Future[Any]
    ended: Ended
    thread: "_Thread | None" = None


class _Thread:
    """A thread that runs one call after the other. It is a daemon, so it never holds up the exit.

    Args:
        done: called in the thread, with the call's value and error; whether the event loop heard.
    """

    def __init__(
        self, queue_name: str, done: Callable[[Call, Any, BaseException | None], bool]
    ) -> None:
        self._queue_name = queue_name
        self._done = done
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self.idle_since = 0.0
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def begin(self, call: Call) -> None:
        call.thread = self
        self._calls.put(call)

    def end(self) -> None:
        self._calls.put(None)

    def _work(self) -> None:
        hears = True
        while hears:
            self.thread.name = IDLE_NAME + self._queue_name
            call = self._calls.get()
            if call is None:
                return
            self.thread.name = THREAD_NAME + self._queue_name
            value, error = None, None
            try:
                value = call.context.run(call.function)
            except BaseException as raised:
                error = raised
            hears = self._done(call, value, error)
            del call, value, error  # An idle thread keeps nothing alive.


class _Stray(NamedTuple):
    """A call that still runs after its attempt has ended."""

    thread: threading.Thread
    task_id: str
    since: float

    def description(self) -> dict[str, Any]:
        # The only way to another thread's frame.
        frame = sys._current_frames().get(self.thread.ident or 0)  # noqa: SLF001
        frames = traceback.extract_stack(frame)[-MAX_STACK:] if frame else []
        return {
            "task_id": self.task_id,
            "left_for_s": round(time.monotonic() - self.since, 1),
            "stack": [f"{each.filename}:{each.lineno} {each.name}" for each in frames],
        }


class HandlerThreads:
    """The threads of one task's handlers: last in, first out.

    A thread can't be interrupted, so a handler that runs past its time limit leaves its thread
    behind, and another thread takes its place. When `limit` threads are left behind, the task takes
    no further job until one of them ends. So handlers that hang use up neither the machine's
    threads nor its memory.
    """

    def __init__(self, queue_name: str, limit: int) -> None:
        self._queue_name = queue_name
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._idle: list[_Thread] = []
        self._running = 0
        self._waiting: deque[Call] = deque()
        self._finished: deque[tuple[Call, Any, BaseException | None]] = deque()
        self._is_due = False
        self._strays: dict[Call, _Stray] = {}
        self._room = asyncio.Event()
        self._stuck_since = asyncio.Event()
        self._pruning: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.has_room = True

    async def room(self) -> None:
        """Wait until a further job may be taken."""
        while not self.has_room:
            await self._room.wait()

    def run(self, function: Callable[[], Any], ended: Ended) -> Call:
        """Call a function in a thread, with a copy of this context's variables.

        If the machine gives no further thread, the call waits for one that runs another call.

        Raises:
            NoThreadError: there is no thread, and none that would come free.
        """
        context = contextvars.copy_context()
        call = Call(function, context, self._loop.create_future(), ended)
        if self._idle:
            self._begin(self._idle.pop(), call)
            return call
        try:
            thread = _Thread(self._queue_name, self._note_end)
        except (RuntimeError, MemoryError) as error:
            if self._running <= len(self._strays):
                raise NoThreadError(str(error)) from error
            self._waiting.append(call)
        else:
            self._begin(thread, call)
        return call

    def withdraw(self, call: Call) -> bool:
        """Give up a call that still waits for a thread; return whether it did."""
        if call.thread is not None:
            return False
        self._waiting.remove(call)
        return True

    def leave_behind(self, call: Call, task_id: str) -> None:
        """Count a call's thread as left behind: the attempt has ended, the call has not."""
        if call.thread is None or call.result.done():
            return
        self._strays[call] = _Stray(call.thread.thread, task_id, time.monotonic())
        if len(self._strays) >= self._limit and self.has_room:
            self.has_room = False
            self._room.clear()
            self._stuck_since.set()
            self._log_stuck("the task takes no further job until one of these handlers ends")

    async def watch(self) -> None:
        """Wait for ever, unless the task's threads stay stuck for `STUCK_PATIENCE`.

        Raises:
            PartDiedError: they do.
        """
        while True:
            await self._stuck_since.wait()
            self._stuck_since.clear()
            try:
                async with asyncio.timeout(STUCK_PATIENCE):
                    await self.room()
            except TimeoutError:
                self._log_stuck("the worker ends, because none of these handlers does")
                raise PartDiedError(
                    f"all {self._limit} handlers of {self._queue_name} run past their time limit "
                    f"since {STUCK_PATIENCE:g} s; the log has their stacks. A request without a "
                    "timeout is the usual cause: ctx.time_left() gives the seconds for it"
                ) from None

    def close(self) -> None:
        """End the threads that have nothing to run. May be called twice."""
        self._is_closed = True
        if self._pruning is not None:
            self._pruning.cancel()
        idle, self._idle = self._idle, []
        for thread in idle:
            thread.end()
        for thread in idle:
            thread.thread.join(JOIN_PATIENCE)

    def _begin(self, thread: _Thread, call: Call) -> None:
        self._running += 1
        thread.begin(call)

    def _note_end(self, call: Call, value: Any, error: BaseException | None) -> bool:
        """Tell the event loop of a call's end, from its thread; whether there is a loop."""
        self._finished.append((call, value, error))
        if not self._is_due:
            self._is_due = True
            try:
                self._loop.call_soon_threadsafe(self._take_finished)
            except RuntimeError:  # The loop is closed: the worker has ended.
                return False
        return True

    def _take_finished(self) -> None:
        # First of all: a thread that appends from here on wakes the loop again.
        self._is_due = False
        while self._finished:
            call, value, error = self._finished.popleft()
            assert call.thread is not None
            self._running -= 1
            self._reuse(call.thread)
            _deliver(call, value, error)
            if self._strays.pop(call, None) is not None and not self.has_room:
                self.has_room = True
                self._room.set()
                log.warning("handlers_unstuck", queue=self._queue_name, left=len(self._strays))

    def _reuse(self, thread: _Thread) -> None:
        if self._waiting:
            self._begin(thread, self._waiting.popleft())
        elif self._is_closed:
            thread.end()
        else:
            thread.idle_since = self._loop.time()
            self._idle.append(thread)
            if self._pruning is None:
                self._pruning = self._loop.call_later(IDLE_PATIENCE, self._prune)

    def _prune(self) -> None:
        """End the threads that were idle for long: the first ones of the list."""
        self._pruning = None
        now = self._loop.time()
        while self._idle and now - self._idle[0].idle_since >= IDLE_PATIENCE:
            self._idle.pop(0).end()
        if self._idle:
            due = self._idle[0].idle_since + IDLE_PATIENCE
            self._pruning = self._loop.call_at(due, self._prune)

    def _log_stuck(self, reason: str) -> None:
        handlers = [stray.description() for stray in self._strays.values()]
        log.error("handlers_stuck", queue=self._queue_name, reason=reason, handlers=handlers)


def _deliver(call: Call, value: Any, error: BaseException | None) -> None:
    if call.result.done():
        return
    if error is None:
        call.result.set_result(value)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        call.result.set_exception(error)
    else:
        call.result.set_exception(HandlerExitError(error))
    end(call.ended, None)
