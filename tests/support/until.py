"""Waiting without sleeping blindly."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 0.01

PATIENCE = 60.0
"""Seconds that something may take on a machine that is busy with other things; a test that passes
never waits for their end."""


async def until(
    condition: Callable[[], object],
    timeout: float = PATIENCE,
    *,
    message: str | Callable[[], str] = "",
) -> Any:
    """Poll a condition until it is truthy and return what it gave.

    Args:
        condition: a function, or a coroutine function; one that raises fails the test at once.
        timeout: seconds.
        message: what was waited for, or a function that says it when the time is over.
    """
    deadline = time.monotonic() + timeout
    while True:
        result = condition()
        if inspect.isawaitable(result):
            result = await result
        if result:
            return result
        if time.monotonic() > deadline:
            what = message() if callable(message) else message or condition
            raise AssertionError(f"not within {timeout} s: {what}; last: {result!r}")
        await asyncio.sleep(INTERVAL)
