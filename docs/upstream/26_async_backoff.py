"""An async `backoffStrategy` leaves the job in `active`.

What happens: the strategy is called and not awaited. A coroutine is neither -1 nor 0, so it is
passed on as the delay, and redis-py refuses it. The worker emits an error, and the job stays active
until it stalls. Its attempt is not counted.
In Node: `Promise<number> | number`, which is awaited.
Where: `Backoffs.calculate`: `return strategy(...)`.
To mend it: await the result if it is awaitable.
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
    errors: list[object] = []

    async def work(job: Job, token: str) -> None:
        raise ValueError("no luck")

    async def strategy(*_: object) -> int:
        return 10

    job = await queue.add("job", {}, {"attempts": 2, "backoff": {"type": "own"}})
    settings = {"backoffStrategy": strategy}
    worker = Worker("reports", work, {**OPTIONS, "settings": settings})
    worker.on("error", lambda error, *_: errors.append(error))
    while not errors:
        await asyncio.sleep(0.05)
        if await job.getState() == "failed":
            return ""
    return f"the job is {await job.getState()}: {errors[0]}"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
