"""How many cores this process may use."""

import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Final

_QUOTA: Final = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Return the cores that the scheduler gives this process, at least one.

    A container's CPU limit counts too, rounded up, if the container has cgroups version 2.
    """
    cores = float(_cores())
    # OSError: there is no such file. ValueError: the quota is "max".
    with suppress(OSError, ValueError):
        quota, period = map(int, _QUOTA.read_text().split())
        cores = min(cores, quota / period)
    return max(1, math.ceil(cores))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
