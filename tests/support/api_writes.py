"""What the API, or anybody, does to a row, and a handler that waits and ends as told."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from psycopg.types.json import Jsonb

from autoflow_worker import DelayedError, TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.tasks.worker_options import WorkerOptions
from tests.support.api import Api, Json
from tests.support.database import task_data
from tests.support.node import Scheduled
from tests.support.until import until

QUEUE = "q"
HOUR_MS = 3_600_000
IMPATIENT: WorkerOptions = {"lockDuration": 1000, "stalledInterval": 1000}

NEVER_ENDS = f"""
    import asyncio
    from autoflow_worker import define_task

    async def handle(payload, ctx):
        await asyncio.Event().wait()

    tasks = [define_task("{QUEUE}", handle, worker_options={IMPATIENT})]
"""

Ending = Callable[[TaskContext], Awaitable[object]]
Retry = Callable[[Api, str], Awaitable[None]]


async def returns(ctx: TaskContext) -> object:
    return ctx.attempt


async def raises(ctx: TaskContext) -> object:
    raise ValueError(f"attempt {ctx.attempt}")


async def moves(ctx: TaskContext) -> object:
    """Delay the job by nothing, so that it comes again at once."""
    await ctx.job.moveToDelayed(0, ctx.job.token)
    raise DelayedError


class Handler:
    """A handler that waits for its gate and then ends as told.

    Attributes:
        ran: the attempts that were started, by job.
        ends: how they end; the last one goes for all that follow.
    """

    def __init__(self, *ends: Ending, opened: bool = True) -> None:
        self.ran: dict[str, list[int]] = {}
        self.ends = ends or (returns,)
        self.gate = asyncio.Event()
        if opened:
            self.gate.set()

    async def __call__(self, payload: Json, ctx: TaskContext) -> object:
        runs = self.ran.setdefault(ctx.task_id, [])
        runs.append(ctx.attempt)
        await self.gate.wait()
        return await self.ends[min(len(runs), len(self.ends)) - 1](ctx)

    def task(self, queue: str = QUEUE, **options: Any) -> TaskDefinition[Any]:
        return define_task(queue, self, TaskOptions(**options))


async def merge(api: Api, task_id: str, **keys: object) -> None:
    """What the API's own updates are: some keys of the row, merged."""
    patch = Jsonb(keys)
    changed = await api.db.execute(
        "UPDATE tasks SET data = data || %s WHERE id = %s", patch, task_id
    )
    assert changed == 1


async def cancel(api: Api, task_id: str) -> None:
    await merge(api, task_id, status="cancelled")


async def until_state(api: Api, task_id: str, state: str) -> None:
    async def reached() -> bool:
        return await api.node.get_state(QUEUE, task_id) == state

    await until(reached, message=f"{task_id} to be {state}")


async def check_the_next_runs(api: Api, handler: Handler) -> None:
    """The worker is none the worse for it."""
    task_id = await api.schedule(QUEUE)
    await until(lambda: task_id in handler.ran)
    assert (await api.node.get_counts(QUEUE))["waiting"] == 0


async def retry_by_adding(api: Api, task_id: str) -> None:
    """The row is pending again, and the job is added again under its id."""
    await merge(api, task_id, status="pending", attempts=0)
    if await api.node.get_job(QUEUE, task_id):
        await api.node.job(QUEUE, task_id, "remove")
    await api.node.schedule_all(QUEUE, [Scheduled({}, task_id=task_id, attempts=1)])


async def retry_by_adding_a_new_row(api: Api, task_id: str) -> None:
    """As the API would write a row for the first time."""
    data = task_data(QUEUE, {}, maxAttempts=1)
    await api.db.execute("UPDATE tasks SET data = %s WHERE id = %s", Jsonb(data), task_id)
    await api.node.job(QUEUE, task_id, "remove")
    await api.node.schedule_all(QUEUE, [Scheduled({}, task_id=task_id, attempts=1)])


async def retry_by_bullmq(api: Api, task_id: str) -> None:
    await merge(api, task_id, status="pending", attempts=0)
    state = await api.node.get_state(QUEUE, task_id)
    await api.node.job(QUEUE, task_id, "retry", state)


RETRIES: dict[Retry, int] = {retry_by_adding: 1, retry_by_adding_a_new_row: 1, retry_by_bullmq: 2}
