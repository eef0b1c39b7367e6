"""An idle worker takes a healthy connection for a dead one, and sleeps.

What happens: redis-py 8 gives every read a limit of 5 s (`socket_timeout`). An idle worker's
BZPOPMIN blocks for `drainDelay`, which is 5 s as well, and Redis ends a blocking command up to
0.1 s late. So the client hangs up. The retry that `RedisConnection` gives its clients pauses for
2 s, later for up to 20 s, and in this time nobody listens: a new job waits.
In Node: ioredis has no limit for a read, and the Worker sets a timer of its own
(`blockTimeout * 1000 + 1000`) that reconnects.
Where: `RedisConnection.__init__`, `RedisBackend.waitForJob`.
To mend it: give the blocking connection a `socket_timeout` of None, or of the blocking time and
some seconds more.
"""

import asyncio
import os
import time
from typing import Any
from uuid import uuid4

import redis
from bullmq import Job, Queue, Worker

OPTIONS: dict[str, Any] = {
    "connection": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "prefix": f"upstream-{uuid4().hex}",
}


async def work(job: Job, token: str) -> None:
    pass


async def reproduce(queue: Queue) -> str:
    # In place of the two defaults of 5 s: 1 s for both.
    url = OPTIONS["connection"]
    url += "&socket_timeout=1" if "?" in url else "?socket_timeout=1"
    worker = Worker("reports", work, {**OPTIONS, "connection": url, "drainDelay": 1})

    async def listens() -> bool:
        clients = await queue.client.client_list()
        return any(c["name"] == worker.clientName and "b" in c["flags"] for c in clients)

    while not await listens():
        await asyncio.sleep(0.05)
    begun = heard = time.monotonic()
    while time.monotonic() < begun + 8:
        if await listens():
            heard = time.monotonic()
        elif time.monotonic() > heard + 1:
            return "an idle worker has not listened to its queue for a second"
        await asyncio.sleep(0.1)
    return ""


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
