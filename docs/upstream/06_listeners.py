"""An exception out of a listener decides what becomes of a job.

What happens: `emit()` calls listeners in the middle of the worker's own steps. A listener of
"active" that raises makes the worker forget the job that it has just fetched: the job stays in
`active`, and nobody runs it. A listener of "completed" that raises makes the worker fail the
completed job ("Missing lock"). A listener of "error" that raises ends the stalled check.
In Node: `QueueBase.emit` catches what a listener throws and emits it as "error".
Where: `EventEmitter.emit`, and its callers in `Worker.getNextJob` and `Worker.processJob`.
To mend it: catch exceptions in `emit()`, and emit them as "error".
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
    ran = asyncio.Event()
    errors: list[object] = []

    async def work(job: Job, token: str) -> None:
        ran.set()

    def listener(*_: object) -> None:
        raise RuntimeError("a listener's bug")

    job = await queue.add("job", {})
    worker = Worker("reports", work, OPTIONS)
    worker.on("active", listener)
    worker.on("error", lambda error, *_: errors.append(error))
    while not ran.is_set() and not errors:
        await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    state = await job.getState()
    return "" if ran.is_set() else f"the job is {state}, and its handler was never called"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
