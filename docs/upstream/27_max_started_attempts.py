"""The option `maxStartedAttempts` has no effect.

What happens: a job that puts itself off again and again (`DelayedError`) uses no attempt and never
ends. The option that bounds it is taken without a word, as is any option that the worker does not
know.
In Node: a job that was started more often fails, unrecoverably: "job started more than allowable
limit" (https://github.com/taskforcesh/bullmq/pull/3331).
Where: `Worker.processJob`.
To mend it: compare `job.attemptsStarted` there, beside `job.deferredFailure`.
"""

import asyncio
import os
from typing import Any
from uuid import uuid4

import redis
from bullmq import DelayedError, Job, Queue, Worker

OPTIONS: dict[str, Any] = {
    "connection": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "prefix": f"upstream-{uuid4().hex}",
}


async def reproduce(queue: Queue) -> str:
    starts = 0

    async def work(job: Job, token: str) -> None:
        nonlocal starts
        starts += 1
        await job.moveToDelayed(0, token)
        raise DelayedError

    job = await queue.add("job", {})
    Worker("reports", work, {**OPTIONS, "maxStartedAttempts": 2})
    while starts < 4:
        await asyncio.sleep(0.05)
        if await job.getState() == "failed":
            return ""
    return f"with maxStartedAttempts 2, the job was started {starts} times"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
