"""How one task's attempts end: by themselves, at their time limit, or because they are told to."""

import asyncio
import math
import time
from dataclasses import dataclass


class TimeLimitError(Exception):
    """The handler ran past its time limit."""


Ended = asyncio.Future[Exception | None]
"""Done when a handler has ended (None), or is to be ended for this reason."""


@dataclass(slots=True, eq=False)
class Wait:
    """Somebody waits for a handler until it has ended, or until its deadline.

    Attributes:
        ended: what is waited for.
        reason: why the handler is to be ended; None as long as it is not.
    """

    ended: Ended
    deadline: float
    reason: Exception | None = None

    def end(self, reason: Exception) -> None:
        """Say that the handler is to be ended; the first reason counts."""
        self.reason = self.reason or reason
        end(self.ended, self.reason)

    def go_on(self) -> None:
        """Wait for the next part of a handler. It is to be ended if the part before was."""
        self.ended = asyncio.get_running_loop().create_future()
        if self.reason is not None:
            end(self.ended, self.reason)

    def time_left(self) -> float | None:
        """Return the seconds until the deadline, at least 0; None if there is none."""
        if self.deadline == math.inf:
            return None
        return max(0.0, self.deadline - time.monotonic())  # as the event loop's own clock


class TimeLimit:
    """The time limit of one task's attempts.

    All attempts have the same limit, so they run out of time in the order in which they started,
    and one timer serves all of them. Without a `timeout_ms` there is no limit.
    """

    def __init__(self, timeout_ms: int | None) -> None:
        self._timeout_ms = timeout_ms
        self._waits: dict[Wait, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> Wait:
        """Start an attempt's time; when it is over, `ended` gets a `TimeLimitError`."""
        loop = asyncio.get_running_loop()
        ended: Ended = loop.create_future()
        if self._timeout_ms is None:
            return Wait(ended, math.inf)
        wait = Wait(ended, loop.time() + self._timeout_ms / 1000)
        self._add(wait, loop)
        return wait

    def restart(self, wait: Wait) -> None:
        """Start the time of an attempt anew, which was removed."""
        if self._timeout_ms is not None:
            loop = asyncio.get_running_loop()
            wait.deadline = loop.time() + self._timeout_ms / 1000
            self._add(wait, loop)

    def _add(self, wait: Wait, loop: asyncio.AbstractEventLoop) -> None:
        self._waits[wait] = None
        if self._timer is None:
            self._timer = loop.call_at(wait.deadline, self._expire)

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
            oldest.end(TimeLimitError(words))


def end(ended: Ended, error: Exception | None) -> None:
    """Say that a handler has ended, or why it is to be ended; the first word counts."""
    if not ended.done():
        ended.set_result(error)
