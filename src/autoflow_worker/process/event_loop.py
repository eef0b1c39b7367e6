"""The event loop that a command runs on."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import structlog

log = structlog.get_logger(__name__)

T = TypeVar("T")


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, on uvloop where it is installed.

    The loop is not closed. Closing waits for handlers that swallow their cancellation, and for the
    threads of ``asyncio.to_thread``. The process ends next, and with it all of them.
    """
    return asyncio.Runner(loop_factory=_loop_factory()).run(main)


def run_to_its_end(main: Coroutine[Any, Any, T], on_escape: Callable[[BaseException], None]) -> T:
    """Run a coroutine as `run_async` does, to its end, even if a callback raises `SystemExit`.

    Args:
        main: has to end after a call of `on_escape`.
        on_escape: called with what the callback raised: `SystemExit` or `KeyboardInterrupt`.
    """
    loop = asyncio.Runner(loop_factory=_loop_factory()).get_loop()
    task = loop.create_task(main)
    while True:
        try:
            return loop.run_until_complete(task)
        except (SystemExit, KeyboardInterrupt) as error:
            if task.done():
                raise
            log.critical("event_loop_left", exc_info=error)
            on_escape(error)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop, uvloop's where it is installed."""
    return (_loop_factory() or asyncio.new_event_loop)()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - not available on Windows
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
