"""A program that ends while `close()` waits spins for ever.

What happens: `asyncio.run` cancels what is left when its coroutine returns, the inner task of
`close()` as well. `close()` then awaits a task that is cancelled already, catches the
`CancelledError`, and does so again, without ever giving the event loop a turn. The process takes a
whole core until it is killed; Ctrl-C is the same `CancelledError`.
In Node: nothing like it.
Where: `Worker.close`: `while True: await asyncio.shield(teardown_task)`; `Worker.pause`.
To mend it: leave the loop when `teardown_task` is done, whatever it came to.
"""

import asyncio
import os
import signal
import sys
from typing import Any
from uuid import uuid4

from bullmq import Job, Queue, Worker

OPTIONS: dict[str, Any] = {
    "connection": os.environ.get("REDIS_URL", "redis://localhost:6379"),
    "prefix": f"upstream-{uuid4().hex}",
}


async def leave_while_closing() -> None:
    begun = asyncio.Event()

    async def work(job: Job, token: str) -> None:
        begun.set()
        await asyncio.sleep(60)

    queue = Queue("reports", OPTIONS)
    await queue.add("job", {})
    worker = Worker("reports", work, OPTIONS)
    await begun.wait()
    _running = asyncio.create_task(worker.close())
    while not worker.closing:
        await asyncio.sleep(0.01)
    signal.setitimer(signal.ITIMER_REAL, 2)


async def clean() -> None:
    queue = Queue("reports", OPTIONS)
    await queue.obliterate(force=True)
    await queue.close()


given_up: list[bool] = []


def give_up(*_: object) -> None:
    given_up.append(True)
    raise TimeoutError  # into the spinning loop: nothing else would end it


def reproduce() -> str:
    signal.signal(signal.SIGALRM, give_up)
    asyncio.run(leave_while_closing())
    signal.setitimer(signal.ITIMER_REAL, 0)
    asyncio.run(clean())
    return "two seconds after its coroutine, asyncio.run() had not ended" if given_up else ""


found = reproduce()
print(f"fault: {found}" if found else "no fault")
sys.exit(1 if found else 0)
