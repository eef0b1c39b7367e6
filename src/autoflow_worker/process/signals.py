"""Signals as requests: stop, stop at once, tell what runs, be quiet.

| signal | effect |
|---|---|
| SIGTERM, SIGINT | stop; another one, a second later or more: stop at once |
| SIGHUP, SIGQUIT | stop |
| SIGUSR1 | print the stacks of all threads, and what runs |
| SIGUSR2 | nothing |
| SIGTSTP, SIGCONT | be quiet, wake up again; only where the caller handles them |
"""

import asyncio
import faulthandler
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cache
from types import FrameType, MappingProxyType
from typing import Final

import structlog

from autoflow_worker.process import watchdog
from autoflow_worker.process.signal_listener import SignalListener

log = structlog.get_logger(__name__)

STOP_OR_ABORT: Final = (signal.SIGTERM, signal.SIGINT)
STOP: Final = (signal.SIGHUP, signal.SIGQUIT)
TELL: Final = signal.SIGUSR1
IGNORED: Final = signal.SIGUSR2
QUIET: Final = signal.SIGTSTP
WAKE: Final = signal.SIGCONT
SIGNALS: Final = (*STOP_OR_ABORT, *STOP, TELL, IGNORED)
"""Those that are always handled."""

Calls = Mapping[signal.Signals, Callable[[], None]]

SAME_WITHIN: Final = 1.0
"""Seconds within which another signal is the same request. make and supervisors signal a whole
process group, and each process of it passes the signal on."""

EARLY_GRACE: Final = 25.0
"""Seconds that the imports may take after a request to stop."""

BEAT: Final = 0.5
"""Seconds between two times at which a running loop puts the watchdog off."""


class Request(Enum):
    """What a signal asks for."""

    STOP = "stop"
    SAME = "the same as the last"
    ABORT = "abort"
    CALL = "call the function of the signal"
    NOTHING = "nothing"


class Requests:
    """Turns signals into requests.

    Args:
        calls: the signals that have a function, which replaces what they ask for.

    Attributes:
        first: the signal that asked to stop, and when; ``None``: no signal did yet.
    """

    def __init__(self, calls: Collection[int] = ()) -> None:
        self._calls = {*calls, TELL}
        self.first: tuple[int, float] | None = None

    def of(self, number: int, now: float) -> Request:
        """Return what a signal asks for after the earlier ones; `now` is of a monotonic clock."""
        if number in self._calls:
            return Request.CALL
        if number == IGNORED:
            return Request.NOTHING
        if self.first is None:
            self.first = (number, now)
            return Request.STOP
        if number in STOP or now - self.first[1] < SAME_WITHIN:
            return Request.SAME
        return Request.ABORT


_early = Requests()
"""The signals that came before an event loop was there to handle them."""


def hold_signals() -> None:
    """Keep a request to stop for ``stop_on_signals``; let a request to abort end the process.

    Without this, a SIGTERM during the imports would end the process as killed, although nothing
    runs yet.
    """
    _register()
    for number in _not_ignored():
        signal.signal(number, _hold)
    watchdog.print_stacks_on(TELL)


def _not_ignored(numbers: Collection[signal.Signals] = SIGNALS) -> Sequence[signal.Signals]:
    # `nohup` ignores SIGHUP, so that the worker outlives its terminal.
    return [n for n in numbers if n not in STOP or signal.getsignal(n) != signal.SIG_IGN]


def _hold(number: int, _frame: FrameType | None) -> None:
    now = time.monotonic()
    request = _early.of(number, now)
    if request is Request.STOP:
        watchdog.end_at(now + EARLY_GRACE + watchdog.PATIENCE)
    elif request is Request.ABORT:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


@contextmanager
def stop_on_signals(
    grace: float | None = None, calls: Calls = MappingProxyType({})
) -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Yield two events: ``stop`` is set by the first signal, ``abort`` by a later one.

    Enter it in the main thread, where the event loop runs. Why it is as it is:

    - A handler of ``add_signal_handler`` runs only when the loop does. A handler of
      ``signal.signal`` also runs while the loop is blocked, between any two bytecodes. So the
      latter only takes the time, arms the watchdog and leaves the rest to the loop.
    - No Python handler runs while the main thread is deep in foreign C. There a thread arms the
      watchdog.
    - ``asyncio.Runner`` cancels the main task on SIGINT, but only if SIGINT has Python's default
      handler. Ours replaces that handler meanwhile.
    - Programs that a handler starts inherit an ignored signal, but not a handled one. So SIGUSR2
      is handled.

    Args:
        grace: seconds from the signal to the deadline. The watchdog ends a loop that is blocked
            `watchdog.PATIENCE` seconds past the deadline. ``None``: no watchdog.
        calls: what the loop calls at a signal, in place of what the signal asks for.
    """
    _register()
    taker = _Taker(asyncio.get_running_loop(), grace, calls)
    handled = _not_ignored({*SIGNALS, *calls})
    previous = {number: signal.getsignal(number) for number in handled}
    faulthandler.unregister(TELL)
    for number in previous:
        signal.signal(number, taker.on_signal)
    watchdog.print_stacks_on(TELL)
    if _early.first is not None:
        taker.begin_with(_early.first)
    try:
        yield taker.stop, taker.abort
    finally:
        taker.close()
        faulthandler.unregister(TELL)
        _early.first = None
        for number, handler in previous.items():
            # None: C code installed the handler, and Python can't restore it.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class _Taker:
    """Handles signals while a loop runs."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        grace: float | None,
        calls: Calls,
    ) -> None:
        self.stop, self.abort = asyncio.Event(), asyncio.Event()
        self._loop = loop
        self._grace = grace
        self._calls = calls
        self._requests = Requests(calls)
        # The listener's thread may see a signal later than the main thread, so it counts by itself.
        self._listeners_requests = Requests(calls)
        self._deadline = 0.0
        self._beat: asyncio.TimerHandle | None = None
        self._listener = None if grace is None else SignalListener(self._on_number)

    def on_signal(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal, in the main thread, between any two bytecodes."""
        now = time.monotonic()
        request = self._requests.of(number, now)
        self._deadline = self._arm(request, now) or self._deadline
        # RuntimeError: the loop is closed.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._take, number, request)

    def begin_with(self, early: tuple[int, float]) -> None:
        """Go on with the request to stop that came before there was a loop."""
        watchdog.call_off()
        self._requests.first = self._listeners_requests.first = early
        self._deadline = self._arm(Request.STOP, time.monotonic()) or self._deadline
        self._take(early[0], Request.STOP)

    def close(self) -> None:
        if self._beat is not None:
            self._beat.cancel()
        self._grace = None
        if self._listener is not None:
            self._listener.close()
        watchdog.call_off()

    def _on_number(self, number: int, now: float) -> None:
        # In the listener's thread.
        if number in SIGNALS:
            self._arm(self._listeners_requests.of(number, now), now)

    def _arm(self, request: Request, now: float) -> float | None:
        """Arm the watchdog if a request has a deadline, and return that deadline."""
        grace = self._grace
        if grace is None or request not in {Request.STOP, Request.ABORT}:
            return None
        deadline = now + grace if request is Request.STOP else now
        watchdog.end_at(deadline + watchdog.PATIENCE)
        return deadline

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
            case Request.CALL:
                log.info("signal_received", signal=name)
                if (call := self._calls.get(signal.Signals(number))) is not None:
                    call()

    def _keep_alive(self) -> None:
        """Put the watchdog off while the loop runs: closing, past the deadline, has own limits."""
        if self._grace is None:
            return
        # The listener may have seen a signal late and counted it as an abort, unlike the loop.
        watchdog.put_off(max(self._deadline, time.monotonic()) + watchdog.PATIENCE)
        self._beat = self._loop.call_later(BEAT, self._keep_alive)


_fork = threading.local()  # `blocked`: what the forking thread had blocked before


@cache
def _register() -> None:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def _before_fork() -> None:
    # A child that has our handlers still would lose a signal, and write its number to the
    # parent's loop.
    _fork.blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, QUIET, WAKE))


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, getattr(_fork, "blocked", ()))


def _in_child() -> None:
    """Give a forked child Python's own handlers: it has no loop that could act on a signal.

    Its wake-up descriptor is the parent's, so a signal to the child would wake the parent's loop.
    """
    signal.set_wakeup_fd(-1)
    for number in (*SIGNALS, QUIET, WAKE):
        handler = signal.getsignal(number)
        if handler is _hold or isinstance(getattr(handler, "__self__", None), _Taker):
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, default)
    _after_fork()
