"""Threads for handlers that are not async."""

import asyncio
import contextvars
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import structlog

log = structlog.get_logger(__name__)

THREAD_NAME: Final = "handler of "  # `process.leaving` knows these threads by it


class HandlerExitError(Exception):
    """The handler tried to end the process, as by `SystemExit`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(f"the handler raised {type(error).__name__}: {error}")
        self.__cause__ = error


class NoThreadError(Exception):
    """The machine gives no thread for a handler."""


class _Stray(NamedTuple):
    """A thread that still runs after its attempt has ended."""

    thread: threading.Thread
    task_id: str
    since: float

    def description(self) -> dict[str, Any]:
        # The only way to another thread's frame.
        frame = sys._current_frames().get(self.thread.ident or 0)  # noqa: SLF001
        return {
            "task_id": self.task_id,
            "left_for_s": round(time.monotonic() - self.since, 1),
            "at": f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame else "",
        }


class HandlerThreads:
    """The threads of one task's handlers, one for each call.

    A thread can't be interrupted, so a handler that runs past its time limit leaves its thread
    behind. When `limit` threads are left behind, the task takes no further job until one of them
    ends. So handlers that hang use up neither the machine's threads nor its memory.
    """

    def __init__(self, queue_name: str, limit: int) -> None:
        self._queue_name = queue_name
        self._limit = limit
        self._threads: dict[asyncio.Future[Any], threading.Thread] = {}
        self._strays: dict[asyncio.Future[Any], _Stray] = {}
        self._room = asyncio.Event()
        self.has_room = True

    async def room(self) -> None:
        """Wait until a further job may be taken."""
        while not self.has_room:
            await self._room.wait()

    def run(self, call: Callable[[], Any]) -> asyncio.Future[Any]:
        """Call a handler in a thread of its own; return a future of its result.

        The thread is a daemon, so that it does not hold up the process's exit.

        Raises:
            NoThreadError: the machine gives no further thread; nothing was called.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def body() -> None:
            value, error = None, None
            try:
                value = context.run(call)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(_deliver, future, value, error)
            except RuntimeError:  # The event loop is closed: the worker has ended.
                return

        name = THREAD_NAME + self._queue_name
        thread = threading.Thread(target=body, name=name, daemon=True)
        try:
            thread.start()
        except (RuntimeError, MemoryError) as error:
            raise NoThreadError(str(error)) from error
        self._threads[future] = thread
        future.add_done_callback(self._forget)
        return future

    def leave_behind(self, future: asyncio.Future[Any], task_id: str) -> None:
        """Count the thread of this future as left behind: its attempt has ended, it has not."""
        thread = self._threads.get(future)
        if thread is None:
            return
        self._strays[future] = _Stray(thread, task_id, time.monotonic())
        if len(self._strays) >= self._limit and self.has_room:
            self.has_room = False
            self._room.clear()
            log.error(
                "handlers_stuck",
                queue=self._queue_name,
                reason="the task takes no further job until one of these handlers ends",
                handlers=[stray.description() for stray in self._strays.values()],
            )

    def _forget(self, future: asyncio.Future[Any]) -> None:
        self._threads.pop(future, None)
        if self._strays.pop(future, None) is not None and not self.has_room:
            self.has_room = True
            self._room.set()
            log.warning("handlers_unstuck", queue=self._queue_name, left=len(self._strays))


def _deliver(future: asyncio.Future[Any], value: Any, error: BaseException | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(value)
    elif isinstance(error, Exception) and not isinstance(error, StopIteration):
        future.set_exception(error)
    else:
        future.set_exception(HandlerExitError(error))
