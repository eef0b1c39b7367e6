"""A job whose fields can't be parsed comes back for ever.

What happens: `Job.fromJSON` raises while the job is fetched. The job is `active` by then, with a
lock that nobody renews. It stalls, is given back, and raises again. When it has stalled too often,
the script marks it to be failed (`defa`) and gives it out once more, and it raises again. It never
gets to `failed`.
In Node: the same, `JSON.parse` in `Job.fromJSON` throws.
Where: `Worker.nextJobFromJobData`, `Job.fromJSON`.
To mend it: catch the exception there, and move the job to `failed` by its id.
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
        pass

    job = await queue.add("job", {})
    await queue.client.hset(queue.toKey(job.id), "data", "{")
    options = {**OPTIONS, "lockDuration": 50, "stalledInterval": 100, "drainDelay": 0.1}
    worker = Worker("reports", work, options)
    worker.on("error", lambda error, *_: errors.append(error))
    # The first time, one more for `maxStalledCount`, one to be failed, and one for good measure.
    while len(errors) < 4:
        await asyncio.sleep(0.05)
        if await queue.client.zscore(queue.toKey("failed"), job.id) is not None:
            return ""
    return f"fetched {len(errors)} times, and not failed: {errors[0]}"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
