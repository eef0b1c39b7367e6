"""The jobs of a legacy repeatable lose their data after the first one.

What happens: `queue.add(name, data, {repeat})` of bullmq 5 stores no template. The data travels
from one job to the next. The script `updateJobScheduler` of bullmq 6, which the Python package
carries, takes the template's data or `{}`. From the second job on, handlers are given nothing.
Repeatables with a key of the old shape (`name:id:endDate:tz:pattern`) just end after one job.
In Node: 5.65 keeps the data (`schedulerAttributes[2] or ARGV[3]`). 6.7 loses it, too, and for keys
of the old shape it emits an error that says what to do.
Where: `commands/updateJobScheduler-12.lua`, `Worker._scheduleNextIteration`.
To mend it: fall back to `ARGV[3]` as 5.65 does. It is packed and sent already.
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
    seen: list[Any] = []

    async def work(job: Job, token: str) -> None:
        seen.append(job.data)

    await queue.upsertJobScheduler("key", {"every": 200}, "tick", {"kept": True})
    # This is what bullmq 5 leaves: the scheduler's hash has no template.
    await queue.client.hdel(queue.toKey("repeat:key"), "data", "opts")
    Worker("reports", work, OPTIONS)
    while len(seen) < 2:
        await asyncio.sleep(0.05)
    return f"the data of the first jobs: {seen[:2]}" if seen[1] != seen[0] else ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
