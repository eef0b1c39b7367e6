"""Node's `getWorkers()` does not see Python's workers.

What happens: the connections of a worker are named `<prefix>:<queue>`. Node looks for
`<prefix>:<base64 of the queue>`, with `:w:<name>` for a named worker. So dashboards show "no
workers", and some of them refuse to retry jobs (https://github.com/emirce/bullstudio/pull/104).
Besides, both connections of a worker have the name, and would count twice.
In Node: `QueueBase.clientName` encodes the name, and only the blocking connection is given it.
Where: `RedisBackend.clientName`, `RedisBackend.setName`; `Queue.get_workers` looks for the same.
To mend it: encode the queue's name in `clientName`, and name the blocking connection alone.
"""

import asyncio
import base64
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

    Worker("reports", work, OPTIONS)
    names: list[str] = []
    while not names:
        await asyncio.sleep(0.05)
        clients = await queue.client.client_list()
        names = [c["name"] for c in clients if c["name"].startswith(OPTIONS["prefix"])]
    nodes = f"{OPTIONS['prefix']}:{base64.b64encode(b'reports').decode()}"
    return "" if nodes in names else f"it is called {names[0]}, and Node looks for {nodes}"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
