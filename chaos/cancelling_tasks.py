"""Tasks of each kind whose handlers run until they are told that they are cancelled."""

import asyncio
import os
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from autoflow_worker import (
    BatchContext,
    BatchItem,
    BatchOptions,
    TaskCancelledError,
    TaskContext,
    TaskOptions,
    define_task,
)

FOLDER_VARIABLE = "CHAOS_CANCELLING"
PER_KIND = 100
BATCH_SIZE = 10
PROCESSES = 5
"""Of each of the two tasks; their jobs run one after the other."""

_OPTIONS = TaskOptions(concurrency=PER_KIND, timeout_ms=None)
_IN_PROCESSES = TaskOptions(concurrency=PROCESSES, timeout_ms=None, run_in="process")
_BATCHES = TaskOptions(concurrency=PER_KIND // BATCH_SIZE, timeout_ms=None)


class Empty(BaseModel):
    """A payload without a field."""


def note(what: str, ctx: TaskContext) -> None:
    """Write a line that says what happened, and when."""
    path = Path(os.environ[FOLDER_VARIABLE]) / f"{what}-{os.getpid()}"
    with path.open("a") as file:
        file.write(f"{ctx.task_id} {time.time()}\n")


async def wait_forever(_payload: Empty, ctx: TaskContext) -> None:
    note("began", ctx)
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if ctx.cancelled:
            note("told", ctx)
        raise


def in_thread(_payload: Empty, ctx: TaskContext) -> None:
    note("began", ctx)
    while not ctx.cancelled:
        time.sleep(0.02)
    note("told", ctx)
    ctx.raise_if_cancelled()


def sleep_in_process(_payload: Empty, ctx: TaskContext) -> None:
    note("began", ctx)
    try:
        while True:
            time.sleep(3600)
    except BaseException:
        if ctx.cancelled:
            note("told", ctx)
        raise


async def in_batch(items: Sequence[BatchItem[Empty]], _ctx: BatchContext) -> None:
    async def watch(item: BatchItem[Empty]) -> None:
        note("began", item.ctx)
        await item.ctx.wait_cancelled()
        note("told", item.ctx)
        item.fail(TaskCancelledError("the task is cancelled"))

    async with asyncio.TaskGroup() as group:
        for item in items:
            group.create_task(watch(item))


tasks = [
    define_task("cancel-loop", wait_forever, _OPTIONS),
    define_task("cancel-thread", in_thread, _OPTIONS),
    define_task("cancel-process", sleep_in_process, _IN_PROCESSES),
    define_task("cancel-process-async", wait_forever, _IN_PROCESSES),
    define_task("cancel-batch", in_batch, _BATCHES, batch=BatchOptions(size=BATCH_SIZE)),
]
