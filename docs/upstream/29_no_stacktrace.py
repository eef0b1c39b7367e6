"""A job that stalled too often gets the stacktrace "NoneType: None".

What happens: `updateStacktrace` formats the exception that is being handled. For a deferred failure
(a job that stalled too often, or whose child failed) there is none, and `traceback.format_exc()`
says "NoneType: None", which is stored in the job.
In Node: the error's own stack, whose first line is the reason.
Where: `Job.updateStacktrace`, called by `Job.moveToFailed`.
To mend it: `traceback.format_exception(err)` of the exception that `moveToFailed` is given.
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
        pass

    job = await queue.add("job", {})
    # So the script leaves a job that stalled too often, for the worker that fetches it.
    await queue.client.hset(queue.toKey(job.id), "defa", "job stalled more than allowable limit")
    Worker("reports", work, OPTIONS)
    while await job.getState() != "failed":
        await asyncio.sleep(0.05)
    stored = await queue.client.hget(queue.toKey(job.id), "stacktrace")
    return f"its stacktrace is {stored}" if "NoneType: None" in (stored or "") else ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
