"""Closing a worker closes the client that it was given.

What happens: `connection` may be a `redis.asyncio.Redis` that other workers, queues and the
application use. `worker.close()` closes it for all of them, in the middle of their commands.
In Node: a connection that was passed in is shared, and stays open.
An open pull request: https://github.com/taskforcesh/bullmq/pull/4103. It also says what else goes
wrong: the blocking read runs over the same client as everything else.
Where: `RedisConnection.__init__` and `.close`, `RedisBackend.close`.
To mend it: note whether the client was passed in, and close only one's own.
"""

import asyncio
import os
from typing import Any
from uuid import uuid4

import redis
from bullmq import Queue, Worker
from redis.asyncio import Redis

OPTIONS: dict[str, Any] = {
    "connection": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "prefix": f"upstream-{uuid4().hex}",
}


async def reproduce(queue: Queue) -> str:
    shared = Redis.from_url(OPTIONS["connection"])
    worker = Worker("reports", None, {**OPTIONS, "connection": shared})
    before = await shared.client_id()
    await worker.close()
    # A closed client opens a new connection by itself.
    after = await shared.client_id()
    await shared.aclose()
    return "" if before == after else "the shared client's connection was closed"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
