"""The task list of the workers that get broken: `TASKS_CONFIG=chaos.tasks:tasks`.

All tasks have one handler. The payload says how long it works, and how often it fails.
"""

import asyncio
import os
import time
from pathlib import Path

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task
from autoflow_worker.tasks.worker_options import WorkerOptions
from chaos.effects import FOLDER_VARIABLE, EffectLog

DEFAULTS_VARIABLE = "CHAOS_DEFAULTS"
"""If it is set, the tasks have BullMQ's default worker options."""

LOCK_S = 4.0
"""Seconds after which a killed worker's locks expire; BullMQ's default is 30."""

SHORT_LOCKS: WorkerOptions = {
    "lockDuration": int(LOCK_S * 1000),
    "stalledInterval": int(LOCK_S * 500),
    # Each kill counts as a stall of all that ran; here the jobs have to outlive them all.
    "maxStalledCount": 1000,
}

QUICK, SLOW, FLAKY, DOOMED, SYNC = (
    f"chaos-{kind}" for kind in ("quick", "slow", "flaky", "doomed", "sync")
)
QUEUES = (QUICK, SLOW, FLAKY, DOOMED, SYNC)

log = EffectLog(Path(os.environ[FOLDER_VARIABLE])) if FOLDER_VARIABLE in os.environ else None


class Work(BaseModel):
    """What a job does.

    Attributes:
        n: the job's number, which tells jobs apart.
        run_ms: how long it works.
        failures: the attempts, from the first, that fail.
        final: such a failure allows no further attempt.
        stubborn: it works on when it is cancelled.
    """

    n: int
    run_ms: int = 0
    failures: int = 0
    final: bool = False
    stubborn: bool = False


class PlannedError(Exception):
    """A failure that the payload asks for."""


async def work(payload: Work, ctx: TaskContext) -> dict[str, object]:
    assert log is not None
    with log.run(ctx) as run_id:
        try:
            await asyncio.sleep(payload.run_ms / 1000)
        except asyncio.CancelledError:
            if not payload.stubborn:
                raise
            await asyncio.sleep(payload.run_ms / 1000)
        return _finish(payload, ctx, run_id)


def work_in_thread(payload: Work, ctx: TaskContext) -> dict[str, object]:
    assert log is not None
    with log.run(ctx) as run_id:
        time.sleep(payload.run_ms / 1000)
        return _finish(payload, ctx, run_id)


def _finish(payload: Work, ctx: TaskContext, run_id: str) -> dict[str, object]:
    if ctx.attempt <= payload.failures:
        error = UnrecoverableError if payload.final else PlannedError
        raise error(f"failure {ctx.attempt} of job {payload.n}")
    return {"n": payload.n, "run": run_id}


tasks = [
    define_task(
        queue,
        work_in_thread if queue == SYNC else work,
        TaskOptions(concurrency=10),
        worker_options=None if DEFAULTS_VARIABLE in os.environ else SHORT_LOCKS,
    )
    for queue in QUEUES
]
