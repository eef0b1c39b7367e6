"""The official `bullmq.Worker`, unchanged.

`python -m bench.plain URL PREFIX QUEUE CONCURRENCY [--uvloop]`
"""

import asyncio
import sys
from typing import Any

import uvloop
from bullmq import Job, Worker


async def handle(_job: Job, _token: str) -> dict[str, Any]:
    return {"success": True, "output": {"ok": True}, "duration": 0}


async def work(url: str, prefix: str, queue: str, concurrency: int) -> None:
    options = {"connection": url, "prefix": prefix, "concurrency": concurrency, "autorun": False}
    await Worker(queue, handle, options).run()


if __name__ == "__main__":
    run = uvloop.run if "--uvloop" in sys.argv else asyncio.run
    given_url, given_prefix, given_queue, given_concurrency = sys.argv[1:5]
    run(work(given_url, given_prefix, given_queue, int(given_concurrency)))
