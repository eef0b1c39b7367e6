"""A queue of jobs that no sound producer makes; they are written straight into Redis."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.recording.patches import row_id
from tests.support.database import Database
from tests.support.until import until

QUEUE = "q"
SOUND = {"name": QUEUE, "data": "{}", "opts": "{}", "timestamp": "1790000000000"}
OPTIONS: Any = {"lockDuration": 5000, "stalledInterval": 200}


Fields = Mapping[str, str | bytes | None]


@dataclass
class Poisoned:
    """A queue with such jobs in it.

    Attributes:
        raw: a client that decodes nothing.
        base: what the queue's keys begin with.
        ran: how often the handler ran for each id.
    """

    raw: Any
    base: bytes
    db: Database
    ran: Counter[str] = field(default_factory=Counter)

    async def handler(self, payload: object, ctx: TaskContext) -> None:
        self.ran[ctx.task_id] += 1
        if ctx.task_id.startswith("fails-"):
            raise ValueError("no luck")

    def task(self) -> TaskDefinition[Any]:
        return define_task(QUEUE, self.handler, TaskOptions(concurrency=1), worker_options=OPTIONS)

    async def add(self, job_id: str | bytes, fields: Fields = SOUND) -> None:
        """Add a job whose fields are sound but for these; None: it lacks the field."""
        raw_id = job_id if isinstance(job_id, bytes) else job_id.encode()
        stored = {
            name: value for name, value in (SOUND | dict(fields)).items() if value is not None
        }
        await self.raw.hset(self.base + raw_id, mapping=stored)
        await self.push(raw_id)

    async def push(self, raw_id: bytes) -> None:
        await self.raw.lpush(self.base + b"wait", raw_id)
        await self.raw.zadd(self.base + b"marker", {"0": 0})

    async def until_all_ended(self) -> None:
        """A sound job that was added last has run, and nothing is left anywhere."""
        await self.add("the-next")
        await self.db.until_status("the-next", "completed")

        async def settled() -> bool:
            left = [await self.raw.llen(self.base + name) for name in (b"wait", b"active")]
            left += [
                await self.raw.zcard(self.base + name) for name in (b"delayed", b"prioritized")
            ]
            return left == [0, 0, 0, 0]

        await until(settled)
        assert await self.raw.keys(self.base + b"*:lock") == []
        assert self.ran["the-next"] == 1

    async def ends(self, raw_id: bytes) -> list[bytes]:
        """The job's events that say how it ended, or that it did not."""
        events = await self.raw.xrange(self.base + b"events")
        return [
            event[b"event"]
            for _, event in events
            if event.get(b"jobId") == raw_id
            and event[b"event"] in (b"completed", b"failed", b"stalled", b"delayed")
        ]

    async def check_failed(self, job_id: str | bytes, reason: str) -> None:
        """It failed once, in both stores, for this reason."""
        raw_id = job_id if isinstance(job_id, bytes) else job_id.encode()
        text = raw_id.decode(errors="surrogateescape")
        row = await self.db.task(row_id(QUEUE, text))
        assert row.status == "failed", job_id
        assert row.error is not None
        assert reason in row.error.reason, job_id
        assert row.failedAt is not None
        assert await self.ends(raw_id) == [b"failed"], job_id
        assert await self.raw.zscore(self.base + b"failed", raw_id) is not None, job_id
        if await self.raw.type(self.base + raw_id) == b"hash":
            told = await self.raw.hget(self.base + raw_id, "failedReason")
            assert told.decode() == row.error.reason, job_id

    async def check_completed(self, job_id: str) -> None:
        """It ran once, and completed in both stores."""
        assert (await self.db.task(row_id(QUEUE, job_id))).status == "completed", job_id
        assert self.ran[job_id] == 1, job_id
        assert b"failed" not in await self.ends(job_id.encode()), job_id
