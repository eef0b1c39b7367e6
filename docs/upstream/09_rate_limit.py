"""After a rate limit the worker waits for `drainDelay` in place of the limit's end.

What happens: a fetch that finds the queue limited returns no job and `limitUntil`. The worker keeps
the time in `self.limitUntil`, and nothing reads it. It takes the queue for empty and blocks for
`drainDelay` (5 s, here 30 s), while jobs wait and the limit (here 1 s) is long over.
In Node: `getNextJob` waits until `limitUntil`, at most `maximumRateLimitDelay` (30 s) at a time.
An open pull request: https://github.com/taskforcesh/bullmq/pull/3321.
Where: `Worker.nextJobFromJobData`, `Worker.getNextJob`.
To mend it: as Node, wait `min(limitUntil - now, maximumRateLimitDelay)` before the next fetch.
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

    await queue.addBulk([{"name": "job", "data": {}} for _ in range(5)])
    limiter = {"max": 1, "duration": 1000}
    Worker("reports", work, {**OPTIONS, "limiter": limiter, "drainDelay": 30})
    oversleeps = 0
    while oversleeps < 20:
        await asyncio.sleep(0.05)
        waiting = await queue.getWaitingCount()
        if not waiting:
            return ""
        limited = await queue.client.exists(queue.toKey("limiter"))
        oversleeps = 0 if limited else oversleeps + 1
    return f"a second after the end of a limit of 1 s, {waiting} jobs still wait"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
