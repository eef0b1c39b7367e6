"""What a handler raises to say what becomes of its job.

The names that end in `Error` are those of Node's BullMQ, where the handler has moved its job before
it raises. The Python package of BullMQ has three of them, and lacks the two that are made here.
`RetryLater` and `RateLimited` are this package's own, and move the job themselves.
"""

import math

from bullmq.custom_errors import DelayedError, UnrecoverableError, WaitingChildrenError

__all__ = [
    "DelayedError",
    "RateLimitError",
    "RateLimited",
    "RetryLater",
    "UnrecoverableError",
    "WaitingChildrenError",
    "WaitingError",
]


MAX_SECONDS = 10 * 365 * 24 * 3600
"""Ten years: BullMQ packs due times into 53 bits."""


class RateLimitError(Exception):
    """The queue is to rest: its job goes back to it, and the attempt is not used up.

    A handler raises it after ``await ctx.job.rateLimit(ms)``. The task fetches no job until the
    queue's rate limit ends; the job is the first of its priority then. Without a limit in Redis the
    job runs again at once, as in Node.
    """


class RetryLater(Exception):  # noqa: N818 - it is no error, but a request
    """Run the job again later, without using up this attempt. Its row says ``delayed`` until then.

    Args:
        seconds: 0 to ten years; 0 is at once.

    Raises:
        ValueError: the seconds are no number in this range.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the handler asks to run again in {seconds:g} s")
        self.delay_ms = _milliseconds(seconds)


class RateLimited(RateLimitError):  # noqa: N818 - it is no error, but a request
    """Let the whole queue rest, and run the job again after that, without using up this attempt.

    This task fetches no job meanwhile. BullMQ tells other workers of the queue only if they have a
    `limiter` among their options.

    Args:
        seconds: from 0.001 to ten years.

    Raises:
        ValueError: the seconds are no number in this range.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the handler lets the queue rest for {seconds:g} s")
        self.rest_ms = max(1, _milliseconds(seconds))


def _milliseconds(seconds: float) -> int:
    if not (math.isfinite(seconds) and 0 <= seconds <= MAX_SECONDS):
        raise ValueError(f"seconds must be from 0 to {MAX_SECONDS}, not {seconds!r}")
    return round(seconds * 1000)


class WaitingError(Exception):
    """The handler has moved its job back to its queue, by ``await ctx.job.moveToWait(token)``.

    The attempt is not used up. Raised without such a move it fails the attempt.
    """
