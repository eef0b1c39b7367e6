"""The task list of workers that are measured: `TASKS_CONFIG=chaos.steady:tasks`."""

import asyncio
import os
import time
from typing import Any

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, define_task

QUEUE = "chaos-steady"
CONCURRENCY_VARIABLE = "CHAOS_CONCURRENCY"


class Work(BaseModel):
    """What a job does.

    Attributes:
        n: the job's number.
        run_ms: how long it works.
        failures: the attempts, from the first, that fail.
    """

    n: int
    run_ms: float
    failures: int = 0


async def work(payload: Work, ctx: TaskContext) -> dict[str, Any]:
    began_ms = time.time() * 1000
    await asyncio.sleep(payload.run_ms / 1000)
    if ctx.attempt <= payload.failures:
        raise RuntimeError(f"failure {ctx.attempt} of job {payload.n}")
    return {"n": payload.n, "beganMs": began_ms}


tasks = [
    define_task(
        QUEUE, work, TaskOptions(concurrency=int(os.environ.get(CONCURRENCY_VARIABLE, "100")))
    )
]
