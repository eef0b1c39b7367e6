"""Sees signals while the main thread is deep in foreign C, where Python's handlers do not run.

A signal's number goes to the wake-up descriptor all the same. A thread reads it there, if the C
code has released the GIL, and passes it on to the descriptor that was set before: the event loop's.
"""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress


class SignalListener:
    """Calls a function in a thread of its own for each signal that has a Python handler.

    If no thread can be started, it does nothing.

    Args:
        on_signal: called with the signal's number and the time of `time.monotonic`.
    """

    def __init__(self, on_signal: Callable[[int, float], None]) -> None:
        self._on_signal = on_signal
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._loops = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Duplicated, as the loop closes its own descriptor when it ends.
        self._copy = None if self._loops == -1 else os.dup(self._loops)
        self._thread = threading.Thread(target=self._listen, name="signal-listener", daemon=True)
        # RuntimeError: no thread can be started. Python's handlers have to do.
        with suppress(RuntimeError):
            self._thread.start()
        if self._thread.ident is None:
            self._restore()

    def close(self) -> None:
        """Restore the wake-up descriptor and end the thread."""
        self._restore()
        # Not `close`, which has no effect while a forked child has the descriptor too.
        self._writer.shutdown(socket.SHUT_WR)
        if self._thread.ident is not None:
            self._thread.join()
        self._writer.close()
        self._reader.close()
        if self._copy is not None:
            os.close(self._copy)

    def _restore(self) -> None:
        current = signal.set_wakeup_fd(-1)
        before = self._loops if current == self._writer.fileno() else current
        if before != -1:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)

    def _listen(self) -> None:
        while numbers := self._reader.recv(4096):
            now = time.monotonic()
            for number in numbers:
                self._on_signal(number, now)
            if self._copy is not None:
                # BlockingIOError: it is full of numbers. BrokenPipeError: the loop closed it.
                with suppress(OSError):
                    os.write(self._copy, numbers)
