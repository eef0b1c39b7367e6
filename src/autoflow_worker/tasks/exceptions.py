"""What a handler raises to say what becomes of its job: BullMQ's exceptions, by Node's names.

The Python package of BullMQ has three of them, and lacks the two that are made here.
"""

from bullmq.custom_errors import DelayedError, UnrecoverableError, WaitingChildrenError

__all__ = [
    "DelayedError",
    "RateLimitError",
    "UnrecoverableError",
    "WaitingChildrenError",
    "WaitingError",
]


class RateLimitError(Exception):
    """The queue is to rest: its job goes back to it, and the attempt is not used up.

    A handler raises it after ``await ctx.job.rateLimit(ms)``. The task fetches no job until the
    queue's rate limit ends; the job is the first of its priority then. Without a limit in Redis the
    job runs again at once, as in Node.
    """


class WaitingError(Exception):
    """The handler has moved its job back to its queue, by ``await ctx.job.moveToWait(token)``.

    The attempt is not used up. Raised without such a move it fails the attempt.
    """
