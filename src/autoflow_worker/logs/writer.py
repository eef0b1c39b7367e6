"""A thread that writes log lines, so that a blocked output blocks nobody else."""

import errno
import os
import select
import threading
import weakref
from collections import deque
from contextlib import suppress
from itertools import accumulate
from typing import IO

#: Lines that may wait for a blocked output; those beyond are dropped and counted.
MAX_WAITING_LINES = 5_000
_BATCH = 500

_writers: "weakref.WeakSet[LogWriter]" = weakref.WeakSet()


class LogWriter:
    """structlog's logger: any thread appends its lines to a queue, and a thread writes them."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        # Lines in order. Between them, each event is set when the lines before it are written.
        self._waiting: deque[str | threading.Event] = deque()
        self._dropped = 0
        # How many lines the output has refused since it accepted one, why, and whether the last
        # line in it was cut.
        self._lost = 0
        self._reason: str | None = None
        self._torn = False
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        _writers.add(self)

    def msg(self, line: str) -> None:
        """Queue one line; never blocks, never raises."""
        if len(self._waiting) >= MAX_WAITING_LINES:
            with self._lock:
                self._dropped += 1
            return
        self._put(line)

    # structlog calls the method that is named after the level.
    debug = info = warning = error = critical = msg

    def flush(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until the lines so far are written; return whether."""
        if self._thread is None:
            return True
        reached = threading.Event()
        self._put(reached)
        return reached.wait(timeout)

    def _put(self, item: str | threading.Event) -> None:
        self._waiting.append(item)
        if self._thread is None:
            self._start()
        if not self._wake.is_set():
            self._wake.set()

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
                with suppress(RuntimeError):  # No thread can be started; the next line tries again.
                    thread.start()
                    self._thread = thread

    def _run(self) -> None:
        while True:
            self._wake.wait()
            # Clear before taking lines, so that a later line wakes the thread again.
            self._wake.clear()
            while self._waiting:
                self._write_batch()

    def _write_batch(self) -> None:
        batch = [self._waiting.popleft() for _ in range(min(_BATCH, len(self._waiting)))]
        lines = [item for item in batch if isinstance(item, str)]
        if self._dropped:
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            lines.append(f"... {dropped} log lines dropped: the output was blocked")
        if lines:
            self._write(lines)
        for item in batch:
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, lines: list[str]) -> None:
        if self._stream is None:
            return
        lost = [f"... {self._lost} log lines lost: {self._reason}"] if self._lost else []
        # End the line that was cut when the output began to refuse.
        start = "\n" if self._torn else ""
        data = _encode(start + "\n".join([*lost, *lines]) + "\n")
        try:
            try:
                descriptor = self._stream.fileno()
            except (OSError, AttributeError):  # a stream in memory
                self._stream.write(data.decode())
                return
        except ValueError:  # Its owner closed it.
            self._stream = None
            return
        written, error = _write_all(descriptor, data)
        if error is None:
            self._lost, self._torn = 0, False
            return
        if error.errno == errno.EBADF:
            # Somebody closed the descriptor. Its number may soon belong to a connection.
            self._stream = None
            return
        # The disk is full, or the reader is gone. Jobs matter more than log lines, so the lines are
        # counted as lost, and the next batch tries again.
        ends = accumulate((len(_encode(line)) + 1 for line in (*lost, *lines)), initial=len(start))
        whole = sum(end <= written for end in ends) - 1
        if whole > 0:
            self._lost = 0
        self._lost += len(lines) - max(whole - len(lost), 0)
        self._reason = error.strerror
        self._torn = data[written - 1 : written] != b"\n" if written else self._torn

    def forget(self) -> None:
        """Start afresh in a forked child: the waiting lines and the thread are the parent's."""
        self._waiting.clear()
        self._wake, self._lock = threading.Event(), threading.Lock()
        self._thread = None


def _write_all(descriptor: int, data: bytes) -> tuple[int, OSError | None]:
    """Write as much as the output accepts; return the number of bytes, and the error if any."""
    written = 0
    while written < len(data):
        try:
            written += os.write(descriptor, memoryview(data)[written:])
        except BlockingIOError:
            # Another process that shares the pipe made it non-blocking.
            select.select([], [descriptor], [], 1.0)
        except OSError as error:
            return written, error
    return written, None


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def _in_child() -> None:
    for writer in _writers:
        writer.forget()


os.register_at_fork(after_in_child=_in_child)
