"""Ends a process that a handler forked, before it runs the worker's event loop.

`multiprocessing` and `os.fork` copy the whole process, with the event loop and the sockets to Redis
and PostgreSQL. A child of `multiprocessing` runs its function and exits. A child of `os.fork` comes
back into the loop if its code returns from the handler or awaits something. There it would run
other jobs a second time and write into its parent's connections.
"""

import asyncio
import os
import sys
import threading
from contextlib import suppress
from functools import cache
from typing import Any, Final, NoReturn

#: Exit code of a child that came back into the worker.
CAME_BACK: Final = 1


class Forked:
    """Tells whether this process was forked while a loop was guarded."""

    here = False  # read where a handler returns without passing the event loop
    guarded: tuple[asyncio.AbstractEventLoop, int] | None = None  # with the id of its thread


def guard_forks(loop: asyncio.AbstractEventLoop) -> None:
    """Make each child that this process forks end when it comes back into the loop.

    Call it in the loop's thread.
    """
    _register()
    Forked.guarded = (loop, threading.get_ident())


def end_of_child(*_: object) -> NoReturn:
    """End this child, with one line to stderr."""
    if sys.stderr is not None:
        words = f"autoflow-worker: the process {os.getpid()}, which a handler forked, ends here: "
        words += "its code came back into the worker. Let it call os._exit, or use multiprocessing."
        with suppress(OSError):
            os.write(2, f"{words}\n".encode())
    os._exit(CAME_BACK)


@cache
def _register() -> None:
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    if Forked.guarded is None:
        return
    Forked.here = True
    loop, loop_thread = Forked.guarded
    loop_in_child: Any = loop
    # A thread reports the end of its work by this method.
    loop_in_child.call_soon_threadsafe = end_of_child
    loop.set_exception_handler(end_of_child)
    if threading.get_ident() != loop_thread:
        return
    current = asyncio.current_task(loop)
    if current is None:  # A bare callback: no check follows it.
        loop.call_soon(end_of_child)
    else:
        asyncio.tasks._leave_task(loop, current)  # noqa: SLF001 - named in asyncio's "Extending"
    # At the end of a task's step asyncio checks that the task is still the loop's current one, and
    # before each step that no other one is. A failed check calls the exception handler.
    nobody: Any = _Nobody()
    asyncio.tasks._enter_task(loop, nobody)  # noqa: SLF001


class _Nobody:
    """The loop's current task in a child."""
