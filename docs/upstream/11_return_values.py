"""Work is done again because its return value is no JSON.

What happens: the value is encoded when the job is acknowledged, after the handler has returned. A
set, a `datetime`, bytes or `nan` raise there, and the exception fails the job as if the handler had
raised it. With attempts left, the work is done again, with the same end.
In Node: the same for the few values that `JSON.stringify` refuses (a BigInt, a circle). Dates, sets
and NaN are encoded somehow.
Where: `Worker.processJob`, `Scripts.moveToFinishedArgs` (`json.dumps(val, allow_nan=False)`).
To mend it: encode with `default=str` or another fallback, or fail the job for good
(`UnrecoverableError`) when its value can't be encoded.
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
    runs = 0

    async def work(job: Job, token: str) -> set[int]:
        nonlocal runs
        runs += 1
        return {1}

    job = await queue.add("job", {}, {"attempts": 2})
    Worker("reports", work, OPTIONS)
    while await job.getState() not in ("completed", "failed"):
        await asyncio.sleep(0.05)
    return f"the work was done {runs} times, and the job is failed" if runs > 1 else ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
