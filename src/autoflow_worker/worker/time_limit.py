"""The time limit of one task's attempts, kept by one timer for all of them."""

import asyncio
import math
from dataclasses import dataclass


class TimeLimitError(Exception):
    """The handler ran past its time limit."""


Ended = asyncio.Future[TimeLimitError | None]
"""Done when an attempt has ended (None), or when its time is over."""


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody waits for an attempt until it has ended, or until its deadline."""

    ended: Ended
    deadline: float


class TimeLimit:
    """The time limit of one task's attempts.

    All attempts have the same limit, so they run out of time in the order in which they started,
    and one timer serves all of them. Without a `timeout_ms` there is no limit.
    """

    def __init__(self, timeout_ms: int | None) -> None:
        self._timeout_ms = timeout_ms
        self._waits: dict[Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, ended: Ended) -> Wait:
        """Start an attempt's time; at its end, `ended` gets a `TimeLimitError`."""
        if self._timeout_ms is None:
            return Wait(ended, math.inf)
        loop = ended.get_loop()
        wait = Wait(ended, loop.time() + self._timeout_ms / 1000)
        self._waits[wait] = None
        if self._timer is None:
            self._timer = loop.call_at(wait.deadline, self._expire)
        return wait

    def remove(self, wait: Wait) -> None:
        """Stop the time of an attempt that has ended."""
        self._waits.pop(wait, None)

    def _expire(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        while self._waits:
            oldest = next(iter(self._waits))
            if oldest.deadline > loop.time():
                self._timer = loop.call_at(oldest.deadline, self._expire)
                return
            del self._waits[oldest]
            words = f"the handler ran past its time limit of {self._timeout_ms} ms"
            end(oldest.ended, TimeLimitError(words))


def end(ended: Ended, error: TimeLimitError | None) -> None:
    """Say that an attempt has ended, or that its time is over; the first word counts."""
    if not ended.done():
        ended.set_result(error)
