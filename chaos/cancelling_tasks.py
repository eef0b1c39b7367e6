"""Tasks of each kind whose handlers run until they are told that they are cancelled."""

import asyncio
import os
import time
from pathlib import Path

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, define_task

FOLDER_VARIABLE = "CHAOS_CANCELLING"
PER_KIND = 100

_OPTIONS = TaskOptions(concurrency=PER_KIND, timeout_ms=None)


class Empty(BaseModel):
    """A payload without a field."""


def note(what: str, ctx: TaskContext) -> None:
    """Write a line that says what happened, and when."""
    path = Path(os.environ[FOLDER_VARIABLE]) / f"{what}-{os.getpid()}"
    with path.open("a") as file:
        file.write(f"{ctx.task_id} {time.time()}\n")


async def in_loop(_payload: Empty, ctx: TaskContext) -> None:
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


tasks = [
    define_task("cancel-loop", in_loop, _OPTIONS),
    define_task("cancel-thread", in_thread, _OPTIONS),
]
