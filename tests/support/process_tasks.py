"""A task list whose handlers run in processes; they do what their payload says."""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import structlog
from pydantic import BaseModel, ConfigDict

from autoflow_worker import RetryLater, TaskContext, TaskOptions, UnrecoverableError, define_task

LIST = "tests.support.process_tasks:tasks"
FAILS_TO_IMPORT = "PROCESS_TASKS_FAIL_TO_IMPORT"

if os.environ.get(FAILS_TO_IMPORT):
    raise RuntimeError("not in this process")


class Payload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    do: str
    text: str = ""


def kill(payload: Payload, ctx: TaskContext) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave_a_program_and_die(payload: Payload, ctx: TaskContext) -> None:
    program = subprocess.Popen(["sleep", "1000"])
    ctx.log(str(program.pid))
    kill(payload, ctx)


def segfault(payload: Payload, ctx: TaskContext) -> None:
    ctypes.string_at(0)


def leave(payload: Payload, ctx: TaskContext) -> None:
    os._exit(3)


def exit_as_scripts_do(payload: Payload, ctx: TaskContext) -> None:
    sys.exit(4)


def fork(payload: Payload, ctx: TaskContext) -> str:
    child = os.fork()
    if child == 0:
        return "the fork's"
    _, status = os.waitpid(child, 0)
    return f"the parent's; {os.waitstatus_to_exitcode(status)}"


def fill_memory(payload: Payload, ctx: TaskContext) -> None:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**32, before[1]))
    try:
        bytearray(2**33)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def swallow(payload: Payload, ctx: TaskContext) -> None:
    while True:
        with suppress(BaseException):
            time.sleep(1000)


def close_descriptors(payload: Payload, ctx: TaskContext) -> str:
    os.closerange(3, 512)
    return "unheard"


def write_to_descriptors(payload: Payload, ctx: TaskContext) -> None:
    for descriptor in range(3, 64):
        with suppress(OSError):
            os.write(descriptor, b"rubbish!" * 8)
    time.sleep(1000)


def give_up(payload: Payload, ctx: TaskContext) -> None:
    raise UnrecoverableError("never again")


def fail_once(payload: Payload, ctx: TaskContext) -> object:
    if ctx.attempt == 1:
        ctx.progress({"reached": payload.text})
        raise ValueError("once")
    return ctx.last_progress


def not_storable(payload: Payload, ctx: TaskContext) -> object:
    return {"here": [object()]}


def report(payload: Payload, ctx: TaskContext) -> dict[str, Any]:
    for number in range(1000):
        ctx.progress(number)
    ctx.progress({"done": 1000})
    ctx.log("first")
    ctx.log("second")
    print("printed")  # noqa: T201 - what handlers do
    os.write(2, b"written\n")
    ctx.logger.info("by_logger", n=1)
    structlog.get_logger().info("by_structlog")
    logging.getLogger("library").warning("by logging")
    return {"time_left": ctx.time_left(), "stopping": ctx.stopping, "cancelled": ctx.cancelled}


def ask_for_job(payload: Payload, ctx: TaskContext) -> object:
    return ctx.job


def nest_a_loop(payload: Payload, ctx: TaskContext) -> str:
    async def inner() -> str:
        await asyncio.sleep(0)
        return "nested"

    return asyncio.run(inner())


def sleep(payload: Payload, ctx: TaskContext) -> None:
    try:
        time.sleep(1000)
    finally:
        sys.stdout.write(f"cleaned up {ctx.cancelled}\n")


def be_interrupted_late(payload: Payload, ctx: TaskContext) -> str:
    try:
        time.sleep(1000)
    finally:
        return "all the same"  # noqa: B012 - a handler that finishes what it began


def come_back(payload: Payload, ctx: TaskContext[Any]) -> str:
    if ctx.last_progress is None:
        ctx.progress("been here")
        raise RetryLater(0.01)
    return "back"


def resources(payload: Payload, ctx: TaskContext[Any]) -> object:
    return [ctx.resources, os.environ.get("AROUND")]


@asynccontextmanager
async def lifespan() -> AsyncIterator[str]:
    await asyncio.sleep(0)
    yield f"of process {os.getpid()}"
    sys.stdout.write("lifespan left\n")


@contextmanager
def around(ctx: TaskContext[Any]) -> Iterator[None]:
    os.environ["AROUND"] = ctx.task_id
    yield
    del os.environ["AROUND"]


def echo(payload: Payload, ctx: TaskContext) -> str:
    return payload.text


def pid(payload: Payload, ctx: TaskContext) -> int:
    return os.getpid()


def threads(payload: Payload, ctx: TaskContext) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def _function(name: str) -> Callable[[Payload, TaskContext], object]:
    function: Callable[[Payload, TaskContext], object] = globals()[name]
    return function


def plain(payload: Payload, ctx: TaskContext) -> object:
    return _function(payload.do)(payload, ctx)


async def coroutine(payload: Payload, ctx: TaskContext) -> object:
    await asyncio.sleep(0)
    if payload.do == "sleep":
        try:
            await asyncio.sleep(1000)
        finally:
            sys.stdout.write(f"cleaned up {ctx.cancelled}\n")
    return _function(payload.do)(payload, ctx)


def wrapper(payload: Payload, ctx: TaskContext) -> object:
    return coroutine(payload, ctx)


def _options(**options: Any) -> TaskOptions:
    given: dict[str, Any] = {"run_in": "process", "timeout_ms": None, "concurrency": 1}
    return TaskOptions(**(given | options))


tasks = [
    define_task("plain", plain, _options()),
    define_task("async", coroutine, _options()),
    define_task("furnished", plain, _options(), lifespan=lifespan, around=around),
    define_task("furnished-async", coroutine, _options(), lifespan=lifespan, around=around),
    define_task("limited", plain, _options(timeout_ms=500)),
    define_task("wrapped", wrapper, _options(timeout_ms=500)),
    define_task("two", plain, _options(concurrency=2)),
    define_task("recycled", plain, _options(recycle_after_jobs=2)),
    define_task("forgetful", plain, _options(recycle_above_mb=1)),
]


def named(*queues: str) -> list[Any]:
    return [task for task in tasks if task.queue_name in queues]
