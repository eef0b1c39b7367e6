"""Delayed jobs are waited for in whole seconds, and the server's version is never read.

What happens: the blocking time is rounded up unless the connection has the capability
`canDoubleTimeout`. Capabilities are set by `getRedisVersion()`, which the worker never calls. So a
job that is due in 0.3 s is looked for after 1 s when nothing else wakes the worker. For the same
reason the worker never warns of an eviction policy other than `noeviction`.
In Node: `RedisConnection.init` reads the version, refuses a server that is too old, and warns.
Where: `Worker.waitForJob` (`math.ceil`), `RedisConnection.getRedisVersion`.
To mend it: call `getRedisVersion()` of the blocking connection when the worker starts.
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

    worker = Worker("reports", work, {**OPTIONS, "autorun": False, "drainDelay": 60})
    bzpopmin, idle, waits = worker.bclient.bzpopmin, asyncio.Event(), []

    async def noted(key: str, timeout: float) -> Any:
        if timeout == 60:
            idle.set()
        else:
            waits.append(timeout)
        return await bzpopmin(key, timeout)

    worker.bclient.bzpopmin = noted
    _running = asyncio.create_task(worker.run())
    await idle.wait()
    await queue.add("job", {}, {"delay": 5500})
    while not waits:
        await asyncio.sleep(0.01)
    return f"for a job due in 5.5 s it blocks for {waits[0]} s" if isinstance(waits[0], int) else ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
