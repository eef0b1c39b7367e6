"""The end of a process that does not end by itself, with the stacks of its threads.

A blocked event loop does nothing at its deadline. `faulthandler` does: its timer is a thread of C
that needs no GIL. It is armed by a signal handler; Python runs those in the main thread between
bytecodes, and in system calls such as those of `time.sleep`, of sockets and of locks.
"""

import faulthandler
import os
import signal
import stat
import sys
import time
from contextlib import suppress
from functools import cache
from typing import Final

PATIENCE: Final = 2.0
"""Seconds past a deadline after which a blocked process ends."""


@cache
def stderr_descriptor() -> int:
    """A descriptor for stacks, which never blocks where that can be had.

    A pipe that nobody reads would hold the process that is to end. Linux opens a pipe or a terminal
    a second time under `/proc`, with flags of its own.
    """
    if sys.stderr is None:
        # Descriptor 2 may be anything by now, a connection to Redis too.
        return os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):
        mode = os.fstat(2).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return 2


def leave_stacks() -> None:
    """Print the stacks of all threads when the process dies by a fault, such as a segfault."""
    faulthandler.enable(file=stderr_descriptor())


def print_stacks_on(number: signal.Signals) -> None:
    """Print the stacks of all threads at a signal, blocked or not, before its own handler runs."""
    faulthandler.register(number, file=stderr_descriptor(), chain=True)


def stop_printing_on(number: signal.Signals) -> None:
    """Undo `print_stacks_on`."""
    faulthandler.unregister(number)


class _Timer:
    """faulthandler has one timer."""

    ends_at: float | None = None


def end_at(deadline: float) -> None:
    """End the process with exit code 1 and all stacks at a time of `time.monotonic`.

    Replaces what was set before. May be called in a signal handler.
    """
    _register()
    _Timer.ends_at = deadline
    _start()


def put_off(deadline: float) -> None:
    """End the process at this time at the earliest, if it is to end."""
    if _Timer.ends_at is not None and _Timer.ends_at < deadline:
        end_at(deadline)


def call_off() -> None:
    """Let the process live."""
    _Timer.ends_at = None
    faulthandler.cancel_dump_traceback_later()


def _start() -> None:
    if _Timer.ends_at is not None:
        left = max(_Timer.ends_at - time.monotonic(), 0.001)
        # RuntimeError: no thread can be started.
        with suppress(RuntimeError):
            faulthandler.dump_traceback_later(left, exit=True, file=stderr_descriptor())


@cache
def _register() -> None:
    # A forked child has the lock of the timer's thread, and not the thread: it would wait for that
    # when it cancels the timer, as every Python does at its exit.
    os.register_at_fork(
        before=faulthandler.cancel_dump_traceback_later,
        after_in_parent=_start,
        after_in_child=_forget,
    )


def _forget() -> None:
    _Timer.ends_at = None
