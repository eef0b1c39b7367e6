"""An acknowledgement whose reply was lost is sent again blindly.

What happens: the connection breaks after Redis has run `moveToFinished` and before the reply has
come. redis-py sends the script again. The job is no longer active, so the second call says "Missing
lock". The worker takes that for a failure of the job, tries to fail it, and emits an error. The job
is completed, no "completed" event comes from the worker, and whoever trusts its events is wrong.
In Node: ioredis sends unanswered commands again as well (`autoResendUnfulfilledCommands`).
Where: `RedisConnection.__init__` (`retry_on_error`), `Worker.processJob`.
To mend it: after an error of `moveToFinished` that says "Missing lock", and a connection error
before it, ask for the job's state.
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
    said: list[str] = []
    worker = Worker("reports", None, OPTIONS)

    async def work(job: Job, token: str) -> None:
        parse = worker.client.parse_response

        async def lost(connection: Any, command: str, **options: Any) -> Any:
            reply = await parse(connection, command, **options)
            if command != "EVALSHA":
                return reply
            worker.client.parse_response = parse
            raise redis.ConnectionError(f"the reply {reply} is lost")

        worker.client.parse_response = lost

    worker.processor = work
    worker.on("error", lambda error, *_: said.append(str(error)))
    worker.on("completed", lambda *_: said.append("completed"))
    job = await queue.add("job", {})
    _running = asyncio.create_task(worker.run())
    while not said:
        await asyncio.sleep(0.05)
    state = await job.getState()
    return "" if said == ["completed"] else f"the job is {state}, the worker says: {said[0]}"


async def main() -> None:
    fault = await reproduce(Queue("reports", OPTIONS))
    with redis.Redis.from_url(OPTIONS["connection"]) as client:  # no worker writes in between
        for key in client.scan_iter(f"{OPTIONS['prefix']}:*"):
            client.delete(key)
    print(f"fault: {fault}" if fault else "no fault", flush=True)
    os._exit(1 if fault else 0)  # at once: a worker in this state may never end


asyncio.run(main())
