"""When a worker ends without a signal: it has been idle for long enough."""

import asyncio
from collections.abc import Sequence
from typing import Final

from autoflow_worker.worker.task_worker import TaskWorker

LOOK_EVERY: Final = 0.5
"""Seconds between two looks at what the worker has come to."""


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
