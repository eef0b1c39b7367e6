"""The task list of the workers that get broken: `TASKS_CONFIG=chaos.tasks:tasks`.

Handlers run in the event loop, in threads, in processes and in batches. The payload says how long
one works, and how often it fails.
"""

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    TaskContext,
    TaskOptions,
    UnrecoverableError,
    define_task,
)
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

QUICK, SLOW, FLAKY, DOOMED, SYNC, PROCESS, PROCESS_ASYNC, BATCH = QUEUES = tuple(
    f"chaos-{kind}"
    for kind in ("quick", "slow", "flaky", "doomed", "sync", "process", "process-async", "batch")
)
CHILD = "autoflow_worker.worker.child"
"""The program of a worker's child processes."""


def _effect_log() -> EffectLog | None:
    if FOLDER_VARIABLE not in os.environ:
        return None
    program = getattr(sys.modules["__main__"], "__spec__", None)
    in_child = program is not None and program.name == CHILD
    # A child takes jobs only from the worker that started it, which lives while it imports this.
    return EffectLog(Path(os.environ[FOLDER_VARIABLE]), os.getppid() if in_child else os.getpid())


log = _effect_log()


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


def work_sync(payload: Work, ctx: TaskContext) -> dict[str, object]:
    assert log is not None
    with log.run(ctx) as run_id:
        time.sleep(payload.run_ms / 1000)
        return _finish(payload, ctx, run_id)


async def work_in_batch(items: Sequence[BatchItem[Work]], _ctx: BatchContext) -> None:
    async def work_on(item: BatchItem[Work]) -> None:
        assert log is not None
        try:
            with log.run(item.ctx) as run_id:
                await asyncio.sleep(item.payload.run_ms / 1000)
                item.complete(_finish(item.payload, item.ctx, run_id))
        except PlannedError as error:
            item.fail(error)

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(work_on(item))


def _finish(payload: Work, ctx: TaskContext, run_id: str) -> dict[str, object]:
    if ctx.attempt <= payload.failures:
        error = UnrecoverableError if payload.final else PlannedError
        raise error(f"failure {ctx.attempt} of job {payload.n}")
    return {"n": payload.n, "run": run_id}


_OPTIONS = None if DEFAULTS_VARIABLE in os.environ else SHORT_LOCKS
_SLOTS = TaskOptions(concurrency=10)
# Each is a process of every worker.
_ONE_PROCESS = TaskOptions(concurrency=1, run_in="process")

tasks = [
    *(define_task(each, work, _SLOTS, None, _OPTIONS) for each in (QUICK, SLOW, FLAKY, DOOMED)),
    define_task(SYNC, work_sync, _SLOTS, None, _OPTIONS),
    define_task(PROCESS, work_sync, _ONE_PROCESS, None, _OPTIONS),
    define_task(PROCESS_ASYNC, work, _ONE_PROCESS, None, _OPTIONS),
    define_task(
        BATCH,
        work_in_batch,
        TaskOptions(concurrency=2),
        None,
        _OPTIONS,
        batch=BatchOptions(size=10, wait_ms=20),
    ),
]
