"""A handler that raises `CancelledError` ends the worker in silence.

What happens: `CancelledError` is no `Exception`, so neither `processJob` nor `extract_result`
catches it. It leaves `run()`, whose task is then cancelled. No event is emitted, and the process
goes on without a worker. A handler needs no intent for this: a cancelled future that it awaits, an
anyio cancel scope or an HTTP client's cancellation raise it as well.
In Node: there is nothing like it. Whatever a processor throws fails its job.
Where: `Worker.processJob` and `utils.extract_result`: `except Exception`.
To mend it: in `processJob`, treat a `CancelledError` as a failure of the job, unless the worker
itself is being cancelled (`asyncio.current_task().cancelling()`).
"""

import asyncio
import os
from typing import Any
from uuid import uuid4

import redis
from bullmq import Job, Queue, Worker

OPTIONS: dict[str, Any] = {
    "connection": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "prefix": f"upstream-{uuid4().hex}",
}


async def reproduce(queue: Queue) -> str:
    async def work(job: Job, token: str) -> None:
        if job.name == "cancels":
            raise asyncio.CancelledError

    worker = Worker("reports", work, {**OPTIONS, "autorun": False})
    errors: list[object] = []
    worker.on("error", lambda error, *_: errors.append(error))
    running = asyncio.create_task(worker.run())
    await queue.add("cancels", {}, {"attempts": 1})
    other = await queue.add("other", {})
    for _ in range(50):
        if running.done():
            return f"the worker has ended; emitted errors: {errors}"
        if await other.getState() == "completed":
            break
        await asyncio.sleep(0.1)
    return ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
