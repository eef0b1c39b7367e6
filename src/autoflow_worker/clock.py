"""The time as BullMQ and the tasks table count it."""

import time


def now_ms() -> int:
    """Return the time since the epoch, in milliseconds."""
    return time.time_ns() // 1_000_000
