"""SIGTERM and SIGINT as events: the first asks to stop, a second to stop at once."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import structlog

log = structlog.get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Signals that came before there was a loop to take them.
_early: list[int] = []


def hold_signals() -> None:
    """Remember the first signal for ``stop_on_signals``; a second one ends the process.

    Without it, a SIGTERM during the imports would end the process as killed, though nothing runs
    yet that could be lost.
    """
    for number in SIGNALS:
        signal.signal(number, _hold)


def _hold(number: int, _frame: FrameType | None) -> None:
    if _early:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
    _early.append(number)


@contextmanager
def stop_on_signals() -> Iterator[tuple[asyncio.Event, asyncio.Event]]:
    """Yield two events: ``stop`` is set by the first SIGTERM or SIGINT, ``abort`` by the next.

    Has to be entered in the main thread, where the event loop runs. asyncio's traps:

    - A handler of ``signal.signal`` runs between any two bytecodes, in the middle of the loop's own
      code, and can't wake the loop; one of ``add_signal_handler`` runs as a callback. It does so
      only while the loop turns: a handler that blocks the loop also holds the signals up.
    - ``asyncio.Runner`` cancels the main task on SIGINT, unless SIGINT has another handler than
      Python's default; ours replaces its for as long as this lasts.
    - ``remove_signal_handler`` does not bring back what was there before, but Python's defaults.
    """
    loop = asyncio.get_running_loop()
    stop, abort = asyncio.Event(), asyncio.Event()

    def on_signal(number: int) -> None:
        name = signal.Signals(number).name
        if stop.is_set():
            log.warning("second_signal_received", signal=name)
            abort.set()
        else:
            log.info("signal_received", signal=name)
            stop.set()

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal, number)
    while _early:
        on_signal(_early.pop())
    try:
        yield stop, abort
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            # None: a handler that was not installed from Python, and can't be brought back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
