"""While the worker closes, locks are no longer renewed once the first job has ended.

What happens: `close()` waits for the running jobs. As soon as the first of them ends, `run()`
leaves its loop, and its `finally` closes the lock manager. The locks of the other jobs expire while
their handlers run. Another worker runs these jobs a second time, or, as here, nobody ends them:
"Missing lock for job".
In Node: the lock manager is closed after the last job (https://github.com/taskforcesh/bullmq/pull/2259).
Where: `Worker.run`: `if (len(jobs) == 0 or len(self.processing) == 0) and self.closing: break`.
A slot that ends gives `None`, so `jobs` is empty while `processing` is not.
To mend it: leave the loop only when `processing` is empty.
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
    gates: dict[str, asyncio.Event] = {}

    async def work(job: Job, token: str) -> None:
        await gates.setdefault(job.id, asyncio.Event()).wait()

    short, long = [await queue.add("job", {}) for _ in range(2)]
    worker = Worker("reports", work, {**OPTIONS, "concurrency": 2, "lockDuration": 1000})
    while len(gates) < 2:
        await asyncio.sleep(0.01)
    closing = asyncio.create_task(worker.close())
    while not worker.closing:
        await asyncio.sleep(0.01)
    gates[short.id].set()
    for _ in range(25):  # more than twice as long as a lock lasts
        await asyncio.sleep(0.1)
        if not await queue.client.exists(queue.toKey(f"{long.id}:lock")):
            return "the handler runs, and its job's lock has expired"
    gates[long.id].set()
    await closing
    return ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
