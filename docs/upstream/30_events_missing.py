"""The worker never emits "drained".

What happens: the worker knows when its queue has become empty (`self.drained`), and tells nobody.
Node's "progress", "ready", "closing", "resumed" and the second argument of "stalled" are missing or
differ, too.
In Node: `nextJobFromJobData` emits "drained" when the first fetch finds nothing.
Where: `Worker.nextJobFromJobData`.
To mend it: emit it where `self.drained` is set.
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
    drained = asyncio.Event()

    async def work(job: Job, token: str) -> None:
        pass

    await queue.add("job", {})
    worker = Worker("reports", work, OPTIONS)
    worker.on("drained", lambda *_: drained.set())
    while not (await queue.getCompletedCount() and worker.drained):
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    return "" if drained.is_set() else "the queue is empty, and no event has said so"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
