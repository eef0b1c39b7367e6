"""`close()` swallows its cancellation, so it can't be given a deadline.

What happens: `asyncio.wait_for(worker.close(), 10)`, the way to bound a shutdown, waits as long as
the longest job. `close()` catches the `CancelledError`, waits on, and raises it at the end. The
same is true of `pause()`.
In Node: nothing cancels a promise, and `Promise.race([worker.close(), timeout])` goes on when the
time is up.
Where: `Worker.close`, the loop around `asyncio.shield(teardown_task)`; `Worker.pause`.
To mend it: `await asyncio.shield(teardown_task)` once. A caller who gives up has decided so, and
the shielded task goes on.
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
    gate, begun = asyncio.Event(), asyncio.Event()

    async def work(job: Job, token: str) -> None:
        begun.set()
        await gate.wait()

    await queue.add("job", {})
    worker = Worker("reports", work, OPTIONS)
    await begun.wait()
    closing = asyncio.create_task(asyncio.wait_for(worker.close(), 0.1))
    await asyncio.wait({closing}, timeout=1.5)
    in_time = closing.done()
    gate.set()
    await asyncio.wait({closing}, timeout=5)
    return "" if in_time else "wait_for(close(), 0.1 s) waits for a job without a limit"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
