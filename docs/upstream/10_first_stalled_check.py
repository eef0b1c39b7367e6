"""The first look for stalled jobs comes after `stalledInterval`.

What happens: the timer sleeps before its first call. After a crash the jobs of the dead worker wait
for `stalledInterval` (30 s) more than they have to. Workers that are restarted more often than that
(a crash loop, a job for a few seconds) never look at all.
In Node: `stalledChecker` looks at once, and then sleeps.
Where: `Timer._job`, `Worker.run`.
To mend it: call `runStalledJobsCheck()` once before the timer starts.
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
    # A worker takes the job, looks for stalled ones, and dies.
    dead = Worker("reports", None, {**OPTIONS, "lockDuration": 50, "stalledInterval": 50})
    await dead.getNextJob("the dead one's token")
    await dead.runStalledJobsCheck()
    await dead.close()
    while await queue.client.exists(queue.toKey(f"{job.id}:lock"), queue.toKey("stalled-check")):
        await asyncio.sleep(0.05)

    Worker("reports", work, {**OPTIONS, "stalledInterval": 60_000})
    for _ in range(20):
        await asyncio.sleep(0.1)
        if await job.getState() == "completed":
            return ""
    return "two seconds after the start, the stalled job is still active"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
