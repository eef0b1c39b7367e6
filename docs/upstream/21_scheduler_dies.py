"""One error while a scheduler is advanced ends it for good.

What happens: the worker advances the scheduler of a job that it has just fetched. If that raises (a
pattern that croniter refuses, or one reply of Redis that is no connection error, such as OOM), the
worker emits an error, and runs the job. No next job was made, and only a job of the scheduler can
make one: the scheduler is still registered, and never runs again.
In Node: `nextJobFromJobData` returns no job. The job stalls, is fetched again, and the scheduler is
advanced then.
Where: `Worker.nextJobFromJobData`, `except Exception as err`.
To mend it: return None there, as Node does.
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
    ran: list[str] = []

    async def work(job: Job, token: str) -> None:
        ran.append(job.id)

    worker = Worker("reports", work, {**OPTIONS, "autorun": False})
    advance = worker.backend.updateJobSchedulerNextMillis

    async def refused_once(*args: Any) -> None:
        worker.backend.updateJobSchedulerNextMillis = advance
        raise redis.ResponseError("OOM command not allowed when used memory > 'maxmemory'")

    worker.backend.updateJobSchedulerNextMillis = refused_once
    await queue.upsertJobScheduler("ticks", {"every": 200}, "tick")
    _running = asyncio.create_task(worker.run())
    for _ in range(20):
        await asyncio.sleep(0.1)
    waiting = await queue.getDelayedCount() + await queue.getWaitingCount()
    if len(ran) == 1 and not waiting:
        return "two seconds later a scheduler of 0.2 s has run once, and no job is left"
    return ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
