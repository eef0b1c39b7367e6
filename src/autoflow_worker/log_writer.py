"""A thread that writes log lines, so that a blocked output blocks nobody else."""

import os
import select
import threading
from collections import deque
from typing import IO

#: Lines that may wait for a blocked output; those beyond are dropped and counted.
MAX_WAITING_LINES = 5_000
_BATCH = 500


class LogWriter:
    """Takes lines from any thread at the price of an append; structlog's last link."""

    def __init__(self, stream: IO[str] | None) -> None:
        self._stream = stream
        # Lines in order, and between them events that are set once what is before them is out.
        self._waiting: deque[str | threading.Event] = deque()
        self._dropped = 0
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

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
        """Wait until the lines so far are out, at most ``timeout`` seconds; say whether so."""
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
                self._thread = threading.Thread(target=self._run, name="log-writer", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            # Cleared before the lines are taken: one that comes later wakes the thread again.
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
            self._write("\n".join(lines) + "\n")
        for item in batch:
            if isinstance(item, threading.Event):
                item.set()

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        data = text.encode("utf-8", "backslashreplace")
        try:
            try:
                descriptor = self._stream.fileno()
            except (OSError, AttributeError):  # a stream in memory
                self._stream.write(data.decode())
                return
            _write_all(descriptor, data)
        except (OSError, ValueError):
            # The reader has gone or the output is closed. Jobs matter more than their lines.
            self._stream = None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            # Another process that shares the pipe made it non-blocking.
            select.select([], [descriptor], [], 1.0)
