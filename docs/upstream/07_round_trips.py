"""A job costs two scripts, one after the other.

What happens: the worker acknowledges each job with `fetch_next=False` and asks for the next one
with a script of its own. The commands of all slots share one connection that sends the next command
only after the last reply. So throughput is bound by the network's round trip, whatever
`concurrency` is.
In Node: the acknowledgement brings the next job, and ioredis pipelines.
Where: `Worker.processJob`: `moveToCompleted(..., fetch_next=False)`, `job.moveToFailed(err,
token)`; `RedisConnection.__init__`: `single_connection_client=True`.
To mend it: fetch with the acknowledgement, and start the job that it brings in the same slot. Note
that `moveToFinished` must then be given the worker's `name` and `limiter`, as `moveToActive` is.
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
    jobs, scripts = 20, 0

    async def work(job: Job, token: str) -> None:
        pass

    await queue.addBulk([{"name": "job", "data": {}} for _ in range(jobs)])
    worker = Worker("reports", work, {**OPTIONS, "autorun": False})
    execute = worker.client.execute_command

    async def counted(name: str, *args: Any, **options: Any) -> Any:
        nonlocal scripts
        scripts += name == "EVALSHA"
        return await execute(name, *args, **options)

    worker.client.execute_command = counted
    _running = asyncio.create_task(worker.run())
    while await queue.getCompletedCount() < jobs:
        await asyncio.sleep(0.05)
    return f"{scripts} scripts for {jobs} jobs" if scripts >= 2 * jobs else ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
