"""Ends a process that does not end by itself, and prints the stacks of its threads.

A blocked event loop does nothing at its deadline. `faulthandler` does, as its timer is a C thread
that needs no GIL. A signal handler arms the timer. Python runs signal handlers in the main thread,
between bytecodes and in system calls such as those of `time.sleep`, sockets and locks.
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
"""Seconds past the deadline after which a blocked process ends."""


@cache
def stderr_descriptor() -> int:
    """Return a descriptor to print stacks to, which does not block where Linux allows that.

    A pipe that nobody reads would block the process that has to end. Under `/proc`, Linux opens a
    pipe or a terminal a second time, with its own flags.
    """
    if sys.stderr is None:
        # Descriptor 2 may be anything by now, even a connection to Redis.
        return os.open(os.devnull, os.O_WRONLY)
    with suppress(OSError):
        mode = os.fstat(2).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISCHR(mode):
            return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
    return 2


def leave_stacks() -> None:
    """Print the stacks of all threads when the process crashes, as by a segfault."""
    faulthandler.enable(file=stderr_descriptor())


def print_stacks_on(number: signal.Signals) -> None:
    """Print the stacks of all threads at a signal, even if it is blocked, before its handler."""
    faulthandler.register(number, file=stderr_descriptor(), chain=True)


class Deadline:
    """When faulthandler's only timer ends the process.

    Attributes:
        at: a time of `time.monotonic`; ``None``: never.
    """

    at: float | None = None


def end_at(deadline: float) -> None:
    """End the process with exit code 1 and all stacks at a time of `time.monotonic`.

    Replaces an earlier deadline. A signal handler may call it.
    """
    _register()
    Deadline.at = deadline
    _start()


def put_off(deadline: float) -> None:
    """Move an earlier deadline, if there is one, to this time."""
    if Deadline.at is not None and Deadline.at < deadline:
        end_at(deadline)


def call_off() -> None:
    """Cancel the deadline."""
    Deadline.at = None
    faulthandler.cancel_dump_traceback_later()


def _start() -> None:
    if Deadline.at is not None:
        left = max(Deadline.at - time.monotonic(), 0.001)
        # RuntimeError: no thread can be started.
        with suppress(RuntimeError):
            faulthandler.dump_traceback_later(left, exit=True, file=stderr_descriptor())


@cache
def _register() -> None:
    # A forked child inherits the lock of the timer's thread, but not the thread. Python cancels
    # the timer at exit, and the child would wait for that thread.
    os.register_at_fork(
        before=faulthandler.cancel_dump_traceback_later,
        after_in_parent=_start,
        after_in_child=_forget,
    )


def _forget() -> None:
    Deadline.at = None
