"""What a worker does with a job: `data.script`, as `act` in tests/node/node.mjs does it for Node.

A script has one step for each run of the job. A step is an object; its keys, in this order, do:

| key | does |
|---|---|
| `progress`, `log` | reports each value of a list |
| `sleep` | waits, in ms |
| `hold` | waits until the story lets it go on |
| `update` | merges an object into the job's data |
| `children` | adds jobs of one queue as this job's children: `queueName`, `name`, `data`, `opts` |
| `call` | calls methods of the job, `[name, ...arguments]`; the answers are the output |
| `see` | reads attributes of the job; they are the output |
| `discard` | lets the job have no further attempt |
| `park` | moves the job to waiting-children if it has unfinished children |
| `limit` | limits the queue for so many ms, and hands the job back |
| `wait` | moves the job back to wait |
| `delay` | moves the job to delayed, for so many ms |
| `throw`, `unrecoverable` | raises, with this message |
| `return` | is the output |
"""

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from bullmq import Job, Queue

from autoflow_worker import (
    DelayedError,
    RateLimitError,
    TaskContext,
    UnrecoverableError,
    WaitingChildrenError,
    WaitingError,
)

Json = dict[str, Any]


async def _later(_made: int, _type: str, _error: BaseException, _job: Job) -> int:
    return 30


STRATEGIES: Final[Mapping[str, Callable[..., Any]]] = {
    "linear": lambda made, _type, _error, _job: made * 40,
    "once more": lambda made, _type, _error, _job: 10 if made < 2 else -1,
    "by type": lambda _made, kind, error, _job: len(kind) * 60 + len(str(error)),
    "later": _later,
}


async def act(payload: Json, ctx: TaskContext) -> object:
    """Do the step of this run."""
    job = ctx.job
    script = payload.get("script", [])
    step: Json = script[job.attemptsStarted - 1] if job.attemptsStarted <= len(script) else {}
    for progress in _several(step, "progress"):
        await job.updateProgress(progress)
    for line in _several(step, "log"):
        await job.log(line)
    await asyncio.sleep(step.get("sleep", 0) / 1000)
    if "hold" in step:
        await _let_go(job)
    if "update" in step:
        await job.updateData({**job.data, **step["update"]})
    if "children" in step:
        await _add_children(job, step["children"])
    answers = [await getattr(job, method)(*args) for method, *args in step.get("call", [])]
    answers += [getattr(job, name) for name in step.get("see", [])]
    if "discard" in step:
        job.discard()
    await _move(job, step)
    if "throw" in step:
        raise Exception(step["throw"])  # noqa: TRY002 - as Node's `new Error`
    if "unrecoverable" in step:
        raise UnrecoverableError(step["unrecoverable"])
    return answers if "call" in step or "see" in step else step.get("return")


async def _let_go(job: Job) -> None:
    """Wait until the story has put `go` into the job's data."""
    while "go" not in (await Job.fromId(job.queue, job.id)).data:  # noqa: ASYNC110 - from outside
        await asyncio.sleep(0.02)


async def _move(job: Job, step: Json) -> None:
    if "park" in step and await job.moveToWaitingChildren(job.token):
        raise WaitingChildrenError
    if "limit" in step:
        await job.rateLimit(step["limit"])
        raise RateLimitError
    if "wait" in step:
        await job.moveToWait(job.token)
        raise WaitingError
    if "delay" in step:
        await job.moveToDelayed(round(time.time() * 1000) + step["delay"], job.token)
        raise DelayedError


def _several(step: Json, name: str) -> list[Any]:
    value = step.get(name, [])
    return value if isinstance(value, list) else [value]


async def _add_children(job: Job, children: list[Json]) -> None:
    parent = {"id": job.id, "queue": job.queueQualifiedName}
    options = {"connection": os.environ["REDIS_URL"], "prefix": os.environ["BULLMQ_PREFIX"]}
    queue = Queue(children[0]["queueName"], options)
    try:
        await queue.addBulk(
            [
                {
                    "name": child["name"],
                    "data": child["data"],
                    "opts": {**child["opts"], "parent": parent},
                }
                for child in children
            ]
        )
    finally:
        await queue.close()
