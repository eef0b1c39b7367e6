"""Ends the process, whatever would keep it alive."""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from autoflow_worker.logs.configure import flush_logs

#: Seconds for the last lines, other people's exit hooks and threads; then the process ends.
EXIT_PATIENCE = 1.5


def leave_process(code: int, message: str | None) -> NoReturn:
    """End the process, even if threads, exit hooks or a blocked output would keep it alive.

    `os._exit` skips the interpreter's own shutdown. That would wait for a blocked output without a
    limit, and take modules away from a handler that still runs in a thread.
    """
    _leave_after(EXIT_PATIENCE, code)
    flush_logs()
    with suppress(OSError, ValueError, AttributeError):
        if message is not None:
            sys.stderr.write(f"{message}\n")
    if any(thread.name.startswith("handler of ") for thread in threading.enumerate()):
        _end_children()
    else:
        with suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
            atexit._run_exitfuncs()  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(code)


def _leave_after(seconds: float, code: int) -> None:
    def leave() -> None:
        try:
            _end_children()
        finally:
            os._exit(code)

    last_resort = threading.Timer(seconds, leave)
    last_resort.daemon = True
    try:
        last_resort.start()
    except RuntimeError:  # No thread can be started. A signal ends most waits of the main thread.
        signal.signal(signal.SIGALRM, lambda *_: os._exit(code))
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _end_children() -> None:
    """End the processes that handlers started by multiprocessing: their jobs were handed back."""
    if "multiprocessing.process" in sys.modules:
        from multiprocessing import active_children  # noqa: PLC0415 - few handlers use it

        for child in active_children():
            child.terminate()
