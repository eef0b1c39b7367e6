"""The demo's jobs: adding them, and asking both stores what became of them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.producer import Producer
from autoflow_worker.local.demo.kinds import BY_PRIORITY, CANCELLED, FINAL, KINDS, Added, Kind, Row
from autoflow_worker.recording import patches
from autoflow_worker.recording.table import CONNECT_TIMEOUT, connection_to
from autoflow_worker.scheduling.scheduler import TaskScheduler
from autoflow_worker.settings import Settings
from autoflow_worker.tasks.definition import PRIORITIES, TaskDefinition


class DemoJobs:
    """Adds the jobs, and tells what became of them.

    Args:
        tasks: the example tasks.
        scheduler: adds those that come with a row.
        redis: adds those that don't.
        database: reads the rows; in autocommit mode.
    """

    def __init__(
        self,
        tasks: Sequence[TaskDefinition[Any]],
        scheduler: TaskScheduler,
        redis: PipelinedRedis,
        database: Any,
    ) -> None:
        self._tasks = {task.queue_name: task for task in tasks}
        self._scheduler = scheduler
        self._producer = Producer(redis, "bull")
        self._database = database
        self.added: list[Added] = []

    async def add_before_start(self) -> None:
        """Add those whose order tells something only if they all wait when the worker starts."""
        await self._add_kind(BY_PRIORITY)

    async def add_others(self) -> None:
        """Add all other jobs, those of one kind beside those of another."""
        async with asyncio.TaskGroup() as group:
            for kind in KINDS:
                if kind is not BY_PRIORITY:
                    group.create_task(self._add_kind(kind))

    async def rows(self) -> dict[str, Row]:
        """Every row's data, by id."""
        cursor = await self._database.execute("SELECT id, data FROM tasks")
        return dict(await cursor.fetchall())

    async def states(self) -> list[str]:
        """The BullMQ state of each job, in the order in which they were added."""
        asked = (
            self._producer.queue(each.kind.queue).getJobState(each.job_id) for each in self.added
        )
        return list(await asyncio.gather(*asked))

    async def settled(self, rows: Mapping[str, Row]) -> bool:
        """Whether every job has come to its end in both stores."""
        statuses = {rows.get(each.row_id, {}).get("status") for each in self.added}
        return statuses <= FINAL and set(await self.states()) <= FINAL

    def tally(self, rows: Mapping[str, Row]) -> dict[Kind, Counter[str]]:
        """How many rows of each kind have which status."""
        counts = {kind: Counter[str]() for kind in KINDS}
        for each in self.added:
            counts[each.kind][rows.get(each.row_id, {}).get("status", "no row")] += 1
        return counts

    async def _add_kind(self, kind: Kind) -> None:
        task = self._tasks[kind.queue]
        levels = tuple(PRIORITIES)
        for number in range(kind.count):
            payload = kind.payload(number)
            if kind.raw:
                job = await self._producer.queue(kind.queue).add(kind.queue, payload)
                row_id = patches.row_id(kind.queue, job.id)
                self.added.append(Added(kind, job.id, row_id))
                continue
            if kind is BY_PRIORITY:  # The least urgent first, so that it is not just their order.
                level = levels[-1 - number % len(levels)]
                task = replace(task, options=replace(task.options, priority=level))
            delay_ms = kind.delay_ms + 50 * number if kind.delay_ms else 0
            task_id = await self._scheduler.schedule(task, payload, delay_ms=delay_ms)
            self.added.append(Added(kind, task_id, task_id))
            if kind is CANCELLED:
                await self._cancel(task_id)

    async def _cancel(self, task_id: str) -> None:
        """Cancel a task as the API does."""
        statement = 'UPDATE tasks SET data = data || \'{"status": "cancelled"}\' WHERE id = %s'
        await self._database.execute(statement, (task_id,))


@asynccontextmanager
async def demo_jobs(
    settings: Settings, tasks: Sequence[TaskDefinition[Any]]
) -> AsyncIterator[DemoJobs]:
    """Connect to both stores for the length of a block."""
    redis_url = settings.redis_url.get_secret_value()
    database_url = settings.database_url.get_secret_value()
    redis = PipelinedRedis(redis_url)
    try:
        await redis.open(settings.worker_startup_timeout)
        async with (
            TaskScheduler(redis_url=redis_url, database_url=database_url) as scheduler,
            connection_to(database_url, CONNECT_TIMEOUT, autocommit=True) as database,
        ):
            yield DemoJobs(tasks, scheduler, redis, database)
    finally:
        await redis.aclose()
