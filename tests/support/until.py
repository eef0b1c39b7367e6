"""Wait for a condition."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

INTERVAL = 0.01

PATIENCE = 60.0
"""Seconds that a condition may take on a busy machine. A test that passes does not use them up."""


async def until(
    condition: Callable[[], object],
    timeout: float = PATIENCE,
    *,
    message: str | Callable[[], str] = "",
) -> Any:
    """Poll a condition until it is truthy, and return its value.

    Args:
        condition: a function, or a coroutine function; one that raises fails the test at once.
        timeout: seconds.
        message: names the condition in the error; may be a function.
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
