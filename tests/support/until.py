"""Waiting without sleeping blindly."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 0.01


async def until(
    condition: Callable[[], object],
    timeout: float = 15.0,
    *,
    message: str | Callable[[], str] = "",
) -> Any:
    """Poll a condition until it is truthy and return what it gave.

    Args:
        condition: a function, or a coroutine function; one that raises fails the test at once.
        timeout: seconds; generous, because a machine may be slow and a passing test never waits.
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
