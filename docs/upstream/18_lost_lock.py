"""A handler is not told that its job's lock is lost.

What happens: a lock is lost when the event loop is blocked, or Redis away, for longer than
`lockDuration`. Another worker runs the job then. The first one learns of it at the next renewal
("lockRenewalFailed"), but the job's `AbortSignal` is not set: the handler goes on, and both do the
work to the end.
In Node: the same. The documentation shows how to call `cancelJob` from a listener of
"lockRenewalFailed".
Where: `LockManager._extend_locks`.
To mend it: abort the signals of the jobs whose locks could not be renewed.
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
    begun: list[Any] = []

    async def work(job: Job, token: str, signal: Any) -> None:
        begun.append(signal)
        await asyncio.sleep(30)

    job = await queue.add("job", {})
    worker = Worker("reports", work, {**OPTIONS, "lockDuration": 600})
    lost = asyncio.Event()
    worker.on("lockRenewalFailed", lambda *_: lost.set())
    while not begun:
        await asyncio.sleep(0.01)
    await queue.client.set(queue.toKey(f"{job.id}:lock"), "another worker's token")
    await asyncio.wait_for(lost.wait(), 20)
    await asyncio.sleep(0.2)
    return "" if begun[0].aborted else "the lock is another worker's, and the handler runs on"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
