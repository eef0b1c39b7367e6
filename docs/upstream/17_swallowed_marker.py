"""A worker that closes can take a job's marker along, so that the other workers sleep on.

What happens: `close()` and `pause()` cancel the task that waits for BZPOPMIN. If Redis has answered
by then, the marker is gone and nobody acts on it. The job waits, and a worker that is blocked in
its own BZPOPMIN is not woken until `drainDelay` has passed, or another job comes.
In Node: the same race. The blocking connection is cut off.
Where: `Worker.close`, `Worker.pause`: `self.waiting.cancel()`.
To mend it: end the read with CLIENT UNBLOCK, wait for its reply, and put a marker that it brought
back (`ZADD marker 0 0`).
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

    worker = Worker("reports", work, {**OPTIONS, "autorun": False})
    wait, answered = worker.backend.waitForJob, asyncio.Event()

    async def slow_network(timeout: float) -> Any:
        marker = await wait(timeout)
        answered.set()
        await asyncio.sleep(1)
        return marker

    worker.backend.waitForJob = slow_network
    _running = asyncio.create_task(worker.run())
    while not worker.waiting:
        await asyncio.sleep(0.01)
    job = await queue.add("job", {})
    await answered.wait()
    await asyncio.wait({asyncio.create_task(worker.close())}, timeout=5)
    if await job.getState() != "waiting" or await queue.client.exists(queue.toKey("marker")):
        return ""
    return "the job waits, and the marker that would wake another worker is gone"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
