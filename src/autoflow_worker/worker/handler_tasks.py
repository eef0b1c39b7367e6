"""Asyncio tasks that handlers start: `SystemExit` in one of them must not end the worker.

asyncio raises `SystemExit` and `KeyboardInterrupt` of any task out of the event loop.
"""

import asyncio
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from autoflow_worker.worker.threads import HandlerExitError

_OWN_CODE: Final = str(Path(__file__).parents[1]) + os.sep


def contain_tasks(loop: asyncio.AbstractEventLoop) -> None:
    """Turn `SystemExit` of each task that foreign code makes into a `HandlerExitError`."""
    loop.set_task_factory(_make_task)


def _make_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
    code = getattr(coro, "cr_code", None)
    if code is None or not code.co_filename.startswith(_OWN_CODE):
        coro = Contained(coro)
    return asyncio.Task(coro, loop=loop, **options)


class Contained(Coroutine[Any, Any, Any]):
    """A coroutine that raises `HandlerExitError` in place of `SystemExit` and its like.

    This is no `async def` around the other coroutine: a task that is cancelled before its first
    step would leave the inner coroutine unawaited, and Python warns of that.
    """

    __slots__ = ("_coro",)

    def __init__(self, coro: Coroutine[Any, Any, Any]) -> None:
        self._coro = coro

    def send(self, value: Any) -> Any:
        try:
            return self._coro.send(value)
        except (SystemExit, KeyboardInterrupt) as error:
            raise HandlerExitError(error) from error

    def throw(self, *error: Any) -> Any:
        try:
            return self._coro.throw(*error)
        except (SystemExit, KeyboardInterrupt) as raised:
            raise HandlerExitError(raised) from raised

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Any:
        return self._coro.__await__()

    def __getattr__(self, name: str) -> Any:
        # `cr_frame`, `__qualname__` and the like: the task shows the coroutine's stack and repr.
        return getattr(self._coro, name)
