"""The jobs, drawn by a seed, and their producer, which adds them as the API does.

The row comes first, then the job, then the row's `externalId`; Node adds the jobs. Some come
without a row, and some with BullMQ's own numbers for ids.
"""

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

import psycopg
from psycopg.types.json import Jsonb

from autoflow_worker.recording import patches
from chaos.effects import Key
from chaos.tasks import (
    BATCH,
    DOOMED,
    FLAKY,
    PROCESS,
    PROCESS_ASYNC,
    QUEUES,
    QUICK,
    SLOW,
    SYNC,
)
from tests.support.database import task_data
from tests.support.node import Node, NodeError, Scheduled

# The comparison at the end needs every job, whatever became of it.
Priority = Literal["critical", "high", "normal", "low"]
KEEP_ALL = {"removeOnComplete": False, "removeOnFail": False}
SHARES = {
    QUICK: 35,
    SLOW: 18,
    FLAKY: 16,
    DOOMED: 8,
    SYNC: 7,
    PROCESS: 4,
    PROCESS_ASYNC: 4,
    BATCH: 8,
}
PRIORITIES: Final[tuple[Priority, ...]] = ("critical", "high", "normal", "low")


@dataclass
class PlannedJob:
    """A job, and how it has to end.

    Attributes:
        numbered: its id is BullMQ's, and known when it is added.
        has_row: the API inserts its row.
        attempts: that it takes.
        completes: whether it ends completed; failed if not.
    """

    queue: str
    job: Scheduled
    numbered: bool
    has_row: bool
    attempts: int
    completes: bool

    @property
    def key(self) -> Key:
        return self.queue, self.job.task_id

    @property
    def row_id(self) -> str:
        own = patches.own_row_id(self.queue, self.job.task_id)
        return own if self.numbered else self.job.task_id


def draw_jobs(rng: random.Random, count: int) -> list[PlannedJob]:
    """Draw jobs of every kind; return them in the order in which they are added."""
    queues = rng.choices(list(SHARES), list(SHARES.values()), k=count)
    jobs = [_draw_job(rng, n, queue) for n, queue in enumerate(queues)]
    return sorted(jobs, key=lambda job: not job.numbered)


def _draw_job(rng: random.Random, n: int, queue: str) -> PlannedJob:
    work: dict[str, Any] = {"n": n}
    max_attempts = 3
    attempts = 1
    if queue == SLOW:
        is_long = rng.random() < 0.05
        work["run_ms"] = rng.randint(2500, 6000) if is_long else rng.randint(100, 1500)
        work["stubborn"] = rng.random() < 0.1
    elif queue == SYNC:
        work["run_ms"] = rng.randint(10, 500)
    elif queue in (PROCESS, PROCESS_ASYNC, BATCH):
        work |= {"run_ms": rng.randint(10, 300), "failures": int(rng.random() < 0.2)}
        attempts = work["failures"] + 1
    elif queue == FLAKY:
        max_attempts = rng.randint(2, 4)
        work |= {"run_ms": rng.randint(0, 100), "failures": rng.randint(1, max_attempts - 1)}
        attempts = work["failures"] + 1
    elif queue == DOOMED:
        work |= {"failures": 1000, "final": rng.random() < 0.3}
        attempts = max_attempts = rng.randint(1, 3)
        attempts = 1 if work["final"] else attempts
    opts: dict[str, Any] = dict(KEEP_ALL)
    if rng.random() < 0.2:
        opts["priority"] = 0  # BullMQ's word for none: such jobs are in `wait`
    if rng.random() < 0.2:
        opts["backoff"] = rng.choice([0, {"type": "fixed", "delay": rng.randint(1, 1000)}])
    numbered = queue in (QUICK, FLAKY) and rng.random() < 0.08
    job = Scheduled(
        work,
        # From the generator, so that a seed draws the same ids.
        task_id=f"{n:06}" + "".join(rng.choices("abcdefghijkmnpqrstuvwxyz-_", k=15)),
        priority=rng.choice(PRIORITIES),
        attempts=max_attempts,
        delay=rng.randint(50, 15_000) if rng.random() < 0.15 else None,
        backoff=rng.randint(50, 500),
        opts=opts,
    )
    has_row = not numbered and rng.random() < 0.75
    if not (has_row or numbered):
        # An id that the API does not give: a task of its own without a row is a deleted one.
        job = replace(job, task_id=f"{job.task_id}-b")
    return PlannedJob(queue, job, numbered, has_row, attempts, queue != DOOMED)


class Producer:
    """Adds jobs as the API does, over every outage.

    Args:
        nodes: Node processes, which take turns.
        database_url: where the rows go.
    """

    def __init__(self, nodes: Sequence[Node], database_url: str) -> None:
        self._nodes = nodes
        self._database_url = database_url
        self._turn = 0

    async def add_all(self, jobs: Sequence[PlannedJob], rng: random.Random, seconds: float) -> None:
        """Add the jobs in this order, in bursts, over that time."""
        loop = asyncio.get_running_loop()
        began, added = loop.time(), 0
        while added < len(jobs):
            burst = jobs[added : added + rng.randint(10, 150)]
            await self.add(burst)
            added += len(burst)
            await asyncio.sleep(began + seconds * added / len(jobs) - loop.time())

    async def add(self, jobs: Sequence[PlannedJob]) -> None:
        """Add a burst of jobs."""
        with_row = [job for job in jobs if job.has_row]
        await self._insist(lambda connection: _insert_rows(connection, with_row))
        self._turn += 1
        node = self._nodes[self._turn % len(self._nodes)]
        by_queue: dict[str, list[Scheduled]] = defaultdict(list)
        for job in jobs:
            if not job.numbered:
                by_queue[job.queue].append(job.job)
        await asyncio.gather(*(_schedule_all(node, queue, by_queue[queue]) for queue in by_queue))
        await self._insist(lambda connection: _merge_external_ids(connection, with_row))

    async def add_numbered(self, jobs: Sequence[PlannedJob]) -> None:
        """Add jobs whose ids are BullMQ's; not over an outage, which could add one twice."""
        for planned in jobs:
            job = planned.job
            options = {"attempts": job.attempts, "priority": PRIORITIES.index(job.priority) + 1}
            if job.delay:
                options["delay"] = job.delay
            backoff = {"type": "exponential", "delay": job.backoff}
            job.task_id = await self._nodes[0].add(
                planned.queue, job.payload, **{"backoff": backoff, **options, **job.opts}
            )

    async def _insist(
        self, action: Callable[[psycopg.AsyncConnection[Any]], Awaitable[None]]
    ) -> None:
        while True:
            try:
                async with await psycopg.AsyncConnection.connect(
                    self._database_url, autocommit=True
                ) as connection:
                    await action(connection)
            except psycopg.OperationalError:
                await asyncio.sleep(0.2)
            else:
                return


async def _schedule_all(node: Node, queue: str, jobs: Sequence[Scheduled]) -> None:
    while True:
        try:
            await node.schedule_all(queue, jobs)
        except NodeError as error:
            # ioredis gives a transaction up when its connection is cut. The ids make it repeatable.
            if "Command aborted" not in str(error):
                raise
        else:
            return


async def _insert_rows(
    connection: psycopg.AsyncConnection[Any], jobs: Sequence[PlannedJob]
) -> None:
    await connection.cursor().executemany(
        "INSERT INTO tasks (id, data) VALUES (%s, %s) ON CONFLICT DO NOTHING",
        [(planned.row_id, Jsonb(_row_of(planned))) for planned in jobs],
    )


async def _merge_external_ids(
    connection: psycopg.AsyncConnection[Any], jobs: Sequence[PlannedJob]
) -> None:
    # One by one, as the API does: it merges each when its job has been added.
    await connection.cursor().executemany(
        "UPDATE tasks SET data = data || jsonb_build_object('externalId', id) WHERE id = %s",
        [(planned.row_id,) for planned in jobs],
    )


def _row_of(planned: PlannedJob) -> dict[str, Any]:
    job = planned.job
    return task_data(
        planned.queue,
        job.payload,
        status="delayed" if job.delay else "pending",
        priority=job.priority,
        maxAttempts=job.attempts,
    )


def numbers_of(jobs: Sequence[PlannedJob]) -> dict[str, int]:
    """How many jobs there are of each kind."""
    kinds = {queue: sum(job.queue == queue for job in jobs) for queue in QUEUES}
    kinds["delayed"] = sum(bool(job.job.delay) for job in jobs)
    kinds["without a row"] = sum(not job.has_row for job in jobs)
    kinds["numbered by BullMQ"] = sum(job.numbered for job in jobs)
    return kinds
