"""The tasks of the image's test; the file's name and place are those of a user's list."""
# ruff: noqa: ARG001 - a handler takes both, used or not

import asyncio
import os

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task


class Numbered(BaseModel):
    number: int


async def whoami(payload: Numbered, ctx: TaskContext) -> dict[str, object]:
    ids = {"pid": os.getpid(), "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups()}
    return {"number": payload.number, **ids}


async def flaky(payload: Numbered, ctx: TaskContext) -> int:
    if ctx.attempt == 1:
        raise ConnectionError("not the first time")
    return payload.number


async def broken(payload: Numbered, ctx: TaskContext) -> None:
    raise UnrecoverableError("never works")


async def slow(payload: Numbered, ctx: TaskContext) -> int:
    await asyncio.sleep(1)
    return payload.number


whoami_task = define_task("image-whoami", whoami, TaskOptions(concurrency=10))
flaky_task = define_task("image-flaky", flaky, TaskOptions(backoff_ms=50, concurrency=10))
broken_task = define_task("image-broken", broken)
slow_task = define_task("image-slow", slow, TaskOptions(concurrency=2))

tasks = [whoami_task, flaky_task, broken_task, slow_task]
