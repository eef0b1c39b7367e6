"""The official `bullmq.Worker`, and what Redis knows of any worker."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from typing import Any

from bullmq import Job, Queue, Worker
from redis.asyncio import Redis
from redis.exceptions import RedisError

from tests.support.until import until

Handler = Callable[[Job, str], Coroutine[Any, Any, Any]]


@asynccontextmanager
async def plain_worker(
    queue: str, handler: Handler, url: str, prefix: str, **options: Any
) -> AsyncIterator[Worker]:
    """Run `bullmq.Worker(queue, handler, options)` until the end of the block.

    The worker's `errors` are what it has emitted as "error".
    """
    worker = Worker(
        queue, handler, {"connection": url, "prefix": prefix, "autorun": False, **options}
    )
    worker.errors = []
    worker.on("error", lambda error, *_: worker.errors.append(str(error)))
    worker.task = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        await end(worker)


async def end(worker: Worker) -> None:
    """End a plain worker in any state. Its own `close()` may wait for ever."""
    closing = asyncio.create_task(worker.close(force=True))
    await asyncio.wait({closing}, timeout=1)
    worker.task.cancel()
    left = {worker.task, closing, *worker.processing}
    for task in left:
        task.cancel()
    await asyncio.wait(left, timeout=20)
    for task in left:
        if task.done() and not task.cancelled():
            task.exception()
    for client in (worker.client, worker.bclient):
        with suppress(RedisError, OSError):
            await client.aclose()


@asynccontextmanager
async def producer(queue: str, url: str, prefix: str) -> AsyncIterator[Queue]:
    """Open the official `bullmq.Queue` until the end of the block."""
    made = Queue(queue, {"connection": url, "prefix": prefix})
    try:
        yield made
    finally:
        await made.close()


async def state(redis: Redis, prefix: str, queue: str, job_id: str) -> str:
    """Return the name of the list or set that holds a job; "" if none does."""
    base = f"{prefix}:{queue}:"
    for name in ("wait", "active", "paused"):
        if job_id in await redis.lrange(base + name, 0, -1):
            return name
    for name in ("prioritized", "delayed", "completed", "failed", "waiting-children"):
        if await redis.zscore(base + name, job_id) is not None:
            return name
    return ""


async def clients(redis: Redis, name: str) -> list[dict[str, str]]:
    """Return the server's connections with this name."""
    found: list[dict[str, str]] = await redis.client_list()
    return [client for client in found if client["name"] == name]


async def blocked(redis: Redis, name: str) -> list[dict[str, str]]:
    """Return the connections with this name that wait in a blocking command."""
    return [client for client in await clients(redis, name) if "b" in client["flags"]]


async def until_idle(redis: Redis, name: str) -> dict[str, str]:
    """Wait until a worker blocks for jobs, and return its connection."""
    found: list[dict[str, str]] = await until(lambda: blocked(redis, name))
    return found[0]


async def until_renewed(redis: Redis, lock: str) -> None:
    """Wait until an existing lock is renewed."""
    left: int = await redis.pttl(lock)

    async def prolonged() -> bool:
        nonlocal left
        before, left = left, await redis.pttl(lock)
        assert left > 0, "the lock is lost"
        return left > before

    await until(prolonged)
