"""Signals as requests: stop, stop at once, tell what runs.

| signal | does |
|---|---|
| SIGTERM, SIGINT | stop; when it comes again a second later or more: stop at once |
| SIGHUP, SIGQUIT | stop |
| SIGUSR1 | print the stacks of all threads, and what runs |
| SIGUSR2 | nothing |
"""

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from enum import Enum
from functools import cache
from types import FrameType
from typing import Final

import structlog

from autoflow_worker.process import watchdog

log = structlog.get_logger(__name__)

STOP_OR_ABORT: Final = (signal.SIGTERM, signal.SIGINT)
STOP: Final = (signal.SIGHUP, signal.SIGQUIT)
TELL: Final = signal.SIGUSR1
IGNORED: Final = signal.SIGUSR2
SIGNALS: Final = (*STOP_OR_ABORT, *STOP, TELL, IGNORED)

SAME_WITHIN: Final = 1.0
"""Seconds in which a further signal is the same request: make and supervisors signal a whole
process group, and each process passes the signal on to the next."""

EARLY_GRACE: Final = 25.0
"""Seconds that the imports may go on after a signal."""

BEAT: Final = 0.5
"""Seconds after which a loop that turns puts its end off again."""


class Request(Enum):
    """What a signal asks for."""

    STOP = "stop"
    SAME = "the same as the last"
    ABORT = "abort"
    TELL = "tell"
    NOTHING = "nothing"


class Requests:
    """Makes requests of signals."""

    def __init__(self) -> None:
        self.stopping = False
        self._since = 0.0

    def of(self, number: int, now: float) -> Request:
        """What this signal asks for, after those before.

        Args:
            number: the signal.
            now: seconds of a clock that never goes back.
        """
        if number == TELL:
            return Request.TELL
        if number == IGNORED:
            return Request.NOTHING
        if not self.stopping:
            self.stopping = True
            self._since = now
            return Request.STOP
        if number in STOP or now - self._since < SAME_WITHIN:
            return Request.SAME
        return Request.ABORT


class _Held:
    """Signals that came before there was a loop to take them."""

    requests = Requests()
    first: int | None = None


def hold_signals() -> None:
    """Remember a request to stop for ``stop_on_signals``; a second one ends the process.

    Without it, a SIGTERM during the imports would end the process as killed, though nothing runs
    yet that could be lost.
    """
    _register()
    for number in _not_ignored():
        signal.signal(number, _hold)
    watchdog.print_stacks_on(TELL)


def _not_ignored() -> Sequence[signal.Signals]:
    """`nohup` has SIGHUP ignored, so that the worker outlives its terminal."""
    return [n for n in SIGNALS if n not in STOP or signal.getsignal(n) != signal.SIG_IGN]


def _hold(number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    request = _Held.requests.of(number, now)
    if request is Request.STOP:
        _Held.first = number
        watchdog.end_at(now + EARLY_GRACE + watchdog.PATIENCE)
    elif request is Request.ABORT:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@contextmanager
def stop_on_signals(
    grace: float | None = None, tell: Callable[[], None] | None = None
) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Yield two events: ``stop`` is set by the first signal, ``abort`` by a later one.

    Has to be entered in the main thread, where the event loop runs. The traps:

    - A handler of ``add_signal_handler`` runs only when the loop turns; one of ``signal.signal``
      runs in a blocked loop too, unless that is deep in foreign C, in the middle of anything. So
      the latter only takes the time and arms the watchdog, and has the loop do the rest. Where even
      that does not run, a thread arms the watchdog.
    - ``asyncio.Runner`` cancels the main task on SIGINT, unless SIGINT has another handler than
      Python's default; ours replaces its for as long as this lasts.
    - A signal that is ignored, rather than handled, would be ignored by every program that a
      handler starts.

    Args:
        grace: seconds from the signal to the deadline. A loop that is blocked `watchdog.PATIENCE`
            past that ends the process. None: it may be blocked for ever.
        tell: called by the loop at SIGUSR1.
    """
    _register()
    taker = _Taker(asyncio.get_running_loop(), grace, tell)
    previous = {number: signal.getsignal(number) for number in _not_ignored()}
    watchdog.stop_printing_on(TELL)
    for number in previous:
        signal.signal(number, taker.on_signal)
    watchdog.print_stacks_on(TELL)
    if _Held.first is not None:
        taker.on_held(_Held.requests, _Held.first)
    try:
        yield taker.stop, taker.abort
    finally:
        taker.close()
        watchdog.stop_printing_on(TELL)
        _Held.requests, _Held.first = Requests(), None
        for number, handler in previous.items():
            # None: a handler that was not installed from Python, and can't be brought back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Taker:
    """Takes signals while a loop runs."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        grace: float | None,
        tell: Callable[[], None] | None,
    ) -> None:
        self.stop, self.abort = asyncio.Event(), asyncio.Event()
        self._loop = loop
        self._grace = grace
        self._tell = tell
        self._requests = Requests()
        self._deadline = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._listener = None if grace is None else _Listener(grace)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """The handler: runs in the main thread, in the middle of anything."""
        now = time.monotonic()
        request = self._requests.of(number, now)
        if request is Request.STOP:
            self._arm(now + (self._grace or 0.0))
        elif request is Request.ABORT:
            self._arm(now)
        # RuntimeError: the loop is closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, number, request)

    def on_held(self, requests: Requests, number: int) -> None:
        """Go on with what was asked before there was a loop."""
        watchdog.call_off()
        self._requests = requests
        if self._listener is not None:
            self._listener.requests = copy(requests)
        self._arm(time.monotonic() + (self._grace or 0.0))
        self._take(number, Request.STOP)

    def close(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._grace = None
        if self._listener is not None:
            self._listener.close()
        watchdog.call_off()

    def _arm(self, deadline: float) -> None:
        if self._grace is None:
            return
        self._deadline = deadline
        watchdog.end_at(deadline + watchdog.PATIENCE)

    def _take(self, number: int, request: Request) -> None:
        name = signal.Signals(number).name
        match request:
            case Request.STOP:
                log.info("signal_received", signal=name)
                self.stop.set()
                self._keep_alive()
            case Request.ABORT:
                log.warning("second_signal_received", signal=name)
                self.abort.set()
            case Request.SAME:
                log.info("signal_repeated", signal=name)
            case Request.NOTHING:
                log.info("signal_ignored", signal=name)
            case Request.TELL:
                log.info("signal_received", signal=name)
                if self._tell is not None:
                    self._tell()

    def _keep_alive(self) -> None:
        """A loop that turns past the deadline is not blocked: whoever closes has own limits."""
        if self._grace is None:
            return
        # The thread may have counted the seconds between two signals otherwise.
        watchdog.put_off(max(self._deadline, time.monotonic()) + watchdog.PATIENCE)
        self._beat = self._loop.call_later(BEAT, self._keep_alive)


class _Listener:
    """A thread that arms the watchdog where the main thread is deep in foreign C.

    Python's handlers do not run there, but the signal's number goes to the wake-up descriptor, and
    a thread can read it if that C has released the GIL. Each number is passed on to the descriptor
    that was set before, the event loop's.

    Args:
        grace: seconds from the signal to the deadline.
    """

    def __init__(self, grace: float) -> None:
        self._grace = grace
        self.requests = Requests()
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._loops = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # A copy: the loop closes its own when it is left.
        self._copy = None if self._loops == -1 else os.dup(self._loops)
        self._thread = threading.Thread(target=self._listen, name="signal-listener", daemon=True)
        # RuntimeError: no thread can be started. The loop's handlers have to do.
        with suppress(RuntimeError):
            self._thread.start()
        if self._thread.ident is None:
            self._give_back()

    def close(self) -> None:
        """Give the wake-up descriptor back."""
        self._give_back()
        # Closing it would do nothing while a forked child has it, too.
        self._writer.shutdown(socket.SHUT_WR)
        if self._thread.ident is not None:
            self._thread.join()
        self._writer.close()
        self._reader.close()
        if self._copy is not None:
            os.close(self._copy)

    def _give_back(self) -> None:
        current = signal.set_wakeup_fd(-1)
        before = self._loops if current == self._writer.fileno() else current
        if before != -1:
            signal.set_wakeup_fd(before, warn_on_full_buffer=False)

    def _listen(self) -> None:
        while numbers := self._reader.recv(4096):
            now = time.monotonic()
            for number in numbers:
                request = self.requests.of(number, now) if number in SIGNALS else Request.NOTHING
                if request is Request.STOP:
                    watchdog.end_at(now + self._grace + watchdog.PATIENCE)
                elif request is Request.ABORT:
                    watchdog.end_at(now + watchdog.PATIENCE)
            if self._copy is not None:
                # BlockingIOError: it is full of numbers already. BrokenPipeError: it was closed.
                with suppress(OSError):
                    os.write(self._copy, numbers)


class _Fork(threading.local):
    """The signals that the thread which forks had blocked before."""

    blocked: Iterable[int] = ()


_fork = _Fork()


@cache
def _register() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _before_fork() -> None:
    # A signal to a child that does not have its own handlers yet would be lost, and its byte would
    # go to the parent's loop.
    _fork.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.blocked)


def _in_child() -> None:
    """A signal to a forked child is the child's, which has neither our loop nor our handlers.

    Its wake-up descriptor is the parent's: a signal to the child would wake the parent's loop.
    """
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        handler = signal.getsignal(number)
        if handler is _hold or isinstance(getattr(handler, "__self__", None), _Taker):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    _after_fork()
