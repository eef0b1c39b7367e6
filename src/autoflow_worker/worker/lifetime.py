"""When a worker ends without a signal: it has been idle, or a fresh process has taken its place."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from autoflow_worker.errors import SettingsError
from autoflow_worker.worker.task_worker import TaskWorker

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at what the worker has come to."""

_STATM: Final = Path("/proc/self/statm")


async def until_idle(workers: Sequence[TaskWorker], seconds: float) -> None:
    """Return when no task has had a job for so long, and no queue has one to give.

    A delayed job, a retry's too, counts from the moment at which it is due. A quiet worker is not
    idle, as nobody knows what its queues have.
    """
    now = asyncio.get_running_loop().time
    since, before = now(), 0
    while now() - since < seconds:
        await asyncio.sleep(min(LOOK_EVERY, seconds / 4))
        jobs = sum(worker.jobs_taken for worker in workers)
        if jobs != before or not all(worker.is_idle for worker in workers):
            since, before = now(), jobs


async def until_worn(
    workers: Sequence[TaskWorker], recycle_jobs: int | None, recycle_memory: int | None
) -> dict[str, Any]:
    """Return when the workers have taken so many jobs, or the process has so many bytes resident.

    Returns:
        The number that was reached, for the log.
    """
    while True:
        jobs = sum(worker.jobs_taken for worker in workers)
        if recycle_jobs is not None and jobs >= recycle_jobs:
            return {"jobs": jobs}
        if recycle_memory is not None and (resident := resident_memory()) >= recycle_memory:
            return {"jobs": jobs, "memory_mb": resident // 1024**2}
        await asyncio.sleep(LOOK_EVERY)


async def until_retired(workers: Sequence[TaskWorker]) -> None:
    """Return when the workers are quiet and nothing runs any more."""
    while True:
        if all(worker.is_quiet and not worker.is_busy for worker in workers):
            return
        await asyncio.sleep(LOOK_EVERY)


def resident_memory() -> int:
    """Return the bytes of this process that are in memory."""
    return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def check_recycle_memory(limit: int) -> None:
    """Check that the process can be smaller than the limit, before its first job.

    Raises:
        SettingsError: it is not, or this system does not tell its size.
    """
    fault = ""
    if not _STATM.exists():
        fault = f"WORKER_RECYCLE_MEMORY needs {_STATM}, which this system lacks: unset it"
    elif (resident := resident_memory()) >= limit:
        fault = (
            f"WORKER_RECYCLE_MEMORY={limit}: it must be more than the {resident} bytes that a "
            "worker of these tasks has before its first job"
        )
    if fault:
        raise SettingsError([fault])
