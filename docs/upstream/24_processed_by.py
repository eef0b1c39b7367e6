"""`processedBy` is never set.

What happens: a worker with a `name` does not tell the scripts about it, so a job's `pb` stays
empty. `Job` does not read the field either. Dashboards can't show who ran a job.
In Node: `moveToActive` and `moveToFinished` are given `name`, and `job.processedBy` has it
(https://github.com/taskforcesh/bullmq/issues/3073).
Where: `Scripts.moveToActive`, `Scripts.moveToFinishedArgs`, `Job.fromJSON`.
To mend it: pack `"name": opts.get("name")` in both, and read `pb`.
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

    job = await queue.add("job", {})
    Worker("reports", work, {**OPTIONS, "name": "worker-1"})
    while await job.getState() != "completed":
        await asyncio.sleep(0.05)
    by = await queue.client.hget(queue.toKey(job.id), "pb")
    return "" if by == "worker-1" else f"a job of the worker `worker-1` was processed by {by}"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
