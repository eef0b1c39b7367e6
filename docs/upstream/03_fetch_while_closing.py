"""A job that is fetched while the worker closes is left in `active`.

What happens: `close()` waits for the tasks that exist when it is called. One of them may be a
fetch, which brings a job. The job's own task is made after that, and nobody waits for it. The
connections are closed, `close()` returns, and the job stays `active` until its lock expires.
In Node: a fetched job is run before the Worker closes
(https://github.com/taskforcesh/bullmq/pull/3059).
Where: `Worker.close`: `asyncio.wait(self.processing)` on a snapshot of the set.
To mend it: wait until `run()` has returned, and let it run what was fetched.
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
    gate = asyncio.Event()

    async def work(job: Job, token: str) -> None:
        await gate.wait()

    await queue.add("job", {})
    worker = Worker("reports", work, {**OPTIONS, "autorun": False})
    fetch, fetched, reply = worker.backend.moveToActive, asyncio.Event(), asyncio.Event()

    async def slow_network(*args: Any) -> Any:
        result = await fetch(*args)
        fetched.set()
        await reply.wait()
        return result

    worker.backend.moveToActive = slow_network
    running = asyncio.create_task(worker.run())
    await fetched.wait()
    closing = asyncio.create_task(worker.close())
    while not worker.closing:
        await asyncio.sleep(0.01)
    reply.set()
    await asyncio.wait({closing}, timeout=2)
    if closing.done() and await queue.client.llen(queue.toKey("active")):
        return "the worker says that it is closed, and its job is still active"
    gate.set()
    await asyncio.wait({closing, running}, timeout=5)
    return ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
