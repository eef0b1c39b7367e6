"""In a process of handlers: its connection to the worker, and how a handler is interrupted."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NoReturn

from autoflow_worker.worker.frames import Decoder, Frame, FrameError, Kind, encode

LINK_LOST: Final = 76
"""Exit code of a process whose handler closed or replaced the connection to the worker."""

INTERRUPT: Final = signal.SIGURG
"""The signal that interrupts a plain `def`. Handlers hardly ever use it, and programs ignore it."""

_READ_SIZE: Final = 256 * 1024
_MAX_BODY: Final = 2**31


class InterruptedHandlerError(BaseException):
    """Raised in a plain `def` that is to end; not an `Exception`, so that few handlers catch it."""


class Interrupts:
    """Raises `InterruptedHandlerError` in the main thread, and nowhere but in a handler."""

    def __init__(self) -> None:
        self._main = threading.get_ident()
        self._running: int | None = None
        self._wanted: int | None = None
        self._holds = 0
        signal.signal(INTERRUPT, self._on_signal)

    def begin(self, job: int) -> None:
        """From here on, `request` interrupts this job; an earlier one does so now."""
        self._running = job
        self._on_signal()

    def end(self) -> None:
        """From here on, nothing is interrupted."""
        self._running = None

    def request(self, job: int) -> None:
        """Interrupt the handler of this job, at most once; from another thread."""
        self._wanted = job
        if self._running == job:
            # Ends a system call of the main thread, too.
            signal.pthread_kill(self._main, INTERRUPT)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Put an interrupt off: half of a frame must not be sent."""
        if threading.get_ident() != self._main:
            yield
            return
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self._on_signal()

    def _on_signal(self, *_: object) -> None:
        if self._holds or self._running is None or self._running != self._wanted:
            return
        self._running = None
        raise InterruptedHandlerError("the handler is to end")


class WorkerLink:
    """The connection to the worker. Any thread may send.

    A process that can't tell the worker what it does ends at once. So does a process whose worker
    has ended.
    """

    def __init__(self, connection: socket.socket, interrupts: Interrupts) -> None:
        self._connection = connection
        self._interrupts = interrupts
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._identity = _identity(connection)
        self._decoder = Decoder(_MAX_BODY)

    @property
    def is_ours(self) -> bool:
        """Whether this is the process that the worker started, and not a fork of it."""
        return os.getpid() == self._pid

    def send(self, kind: Kind, head: dict[str, Any], body: bytes = b"") -> None:
        """Send a frame, which waits while the worker does not read."""
        data = encode(kind, head, body)
        with self._interrupts.held(), self._lock:
            # A handler may have closed this descriptor, and its number may be another file's now.
            if _identity(self._connection) != self._identity:
                _lose()
            try:
                self._connection.sendall(data)
            except OSError:
                _lose()

    def receive(self) -> Frame:
        """Wait for the next frame; one thread only."""
        try:
            while (frame := self._decoder.next()) is None:
                data = self._connection.recv(_READ_SIZE)
                if not data:  # The worker has ended. What the handler started ends, too.
                    os.killpg(0, signal.SIGKILL)
                self._decoder.feed(data)
        except (OSError, FrameError):
            _lose()
        return frame


def _identity(connection: socket.socket) -> tuple[int, int] | None:
    try:
        found = os.fstat(connection.fileno())
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lose() -> NoReturn:
    os._exit(LINK_LOST)
