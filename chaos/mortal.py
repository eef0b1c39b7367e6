"""The task list of workers that die at a crash point: `TASKS_CONFIG=chaos.mortal:tasks`.

Locks are short, so that a successor soon gets the jobs of a dead worker.
"""

import os
from typing import Any, Literal

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task

QUEUES_VARIABLE = "CHAOS_QUEUES"
LOCK_MS = 1000
STALLED_MS = 400
CONCURRENCY = 3

Kind = Literal["plain", "flaky", "at once", "doomed", "final"]


class Fate(BaseModel):
    """How a job ends: it succeeds, or fails once, twice or for good."""

    kind: Kind


async def meet(payload: Fate, ctx: TaskContext) -> dict[str, Any]:
    if payload.kind == "final":
        raise UnrecoverableError("for good")
    if payload.kind == "doomed" or (payload.kind in ("flaky", "at once") and ctx.attempt == 1):
        raise RuntimeError(f"failure {ctx.attempt}")
    return {"job": ctx.task_id}


tasks = [
    define_task(
        queue,
        meet,
        TaskOptions(concurrency=CONCURRENCY),
        worker_options={
            "lockDuration": LOCK_MS,
            "stalledInterval": STALLED_MS,
            # Several of a queue's workers may die with the same job.
            "maxStalledCount": 1000,
        },
    )
    for queue in os.environ.get(QUEUES_VARIABLE, "").split(",")
    if queue
]
