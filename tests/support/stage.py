"""A stage for two workers: the official one, and this one beside it."""

import asyncio
import base64
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

from bullmq import Job, Queue, Worker
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions
from tests.support.plain import (
    Handler,
    plain_worker,
    state,
)
from tests.support.running import Running, running

Payload = dict[str, Any]
NO_LIMIT = TaskOptions(timeout_ms=None, concurrency=2)


@dataclass
class Stage:
    """Both workers, their queues, and what their handlers do.

    Attributes:
        plain, ours: the producers.
        begun: ids of the jobs whose handlers were started, in order.
        ended: ids of the jobs whose handlers have ended.
        gate: handlers wait for it; open as it comes.
    """

    redis: Redis
    redis_url: str
    database_url: str
    prefix: str
    plain: Queue
    ours: Queue
    begun: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    async def plain_handler(self, job: Job, token: str) -> str:
        return await self._run(job.id)

    async def our_handler(self, payload: Payload, ctx: TaskContext) -> str:
        return await self._run(ctx.task_id)

    async def _run(self, job_id: str) -> str:
        self.begun.append(job_id)
        await self.gate.wait()
        self.ended.append(job_id)
        return "done"

    def next_act(self) -> None:
        """Forget what the handlers of the first worker did."""
        self.begun.clear()
        self.ended.clear()

    def run_plain(
        self, handler: Handler | None = None, *, url: str | None = None, **options: Any
    ) -> AbstractAsyncContextManager[Worker]:
        return plain_worker(
            "plain", handler or self.plain_handler, url or self.redis_url, self.prefix, **options
        )

    def run_ours(
        self, task: TaskDefinition[Any], *, url: str | None = None, **settings: Any
    ) -> AbstractAsyncContextManager[Running]:
        return running(
            [task],
            redis_url=url or self.redis_url,
            database_url=self.database_url,
            prefix=self.prefix,
            **settings,
        )

    @property
    def our_name(self) -> str:
        """What our connection for the queue is called: as Node expects it."""
        return f"{self.prefix}:{base64.b64encode(b'ours').decode()}"

    @property
    def plain_name(self) -> str:
        return f"{self.prefix}:plain"

    def key(self, queue: str, name: str) -> str:
        return f"{self.prefix}:{queue}:{name}"

    async def state(self, queue: str, job: Job) -> str:
        return await state(self.redis, self.prefix, queue, job.id)

    async def is_missing(self, key: str) -> bool:
        return not await self.redis.exists(key)


async def holds(redis: Redis, key: str, count: int) -> bool:
    cards: int = await redis.zcard(key)
    return cards == count
