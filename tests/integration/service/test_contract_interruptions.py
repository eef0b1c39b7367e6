"""What a row says of a job that stalled, was handed back or cancelled, or moved itself.

A job's row is compared before and after, so that a test sees every key that was written.
"""

from datetime import UTC, datetime

from redis.asyncio import Redis

from autoflow_worker import DelayedError, TaskContext, WaitingChildrenError
from tests.support.api import Api, Json
from tests.support.handlers import QUEUE, Gate, MustNotRun, hang, task
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.running import RunWorker
from tests.support.until import until
from tests.support.written import due, is_now, patch

HOUR_MS = 3_600_000

HANGING_TASKS = f"""
    import asyncio
    from autoflow_worker import define_task

    async def hang(payload, ctx):
        await asyncio.Event().wait()

    options = {{"lockDuration": 1500, "stalledInterval": 500}}
    tasks = [define_task("{QUEUE}", hang, worker_options=options)]
"""


async def a_job_of_a_dead_worker(api: Api, worker_process: WorkerStarter) -> tuple[str, Json]:
    """Let a worker process pick a job up, and kill it."""
    worker: WorkerProcess = worker_process(HANGING_TASKS)
    task_id = await api.schedule(QUEUE, attempts=3)
    row = await api.until_both_say(QUEUE, task_id, "active")
    worker.kill()
    await worker.wait()
    return task_id, row


async def test_stalled_and_redelivered(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter
) -> None:
    gate = Gate()
    task_id, before = await a_job_of_a_dead_worker(api, worker_process)
    async with run_worker([task(gate, worker_options={"stalledInterval": 100})]):
        await until(lambda: gate.contexts)
        after = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        await api.until_both_say(QUEUE, task_id, "completed")
    written = patch(before, after)
    assert is_now(written.pop("startedAt"))
    assert written == {}
    assert after["attempts"] == gate.contexts[0].attempt == 1


async def test_stalled_more_often_than_allowed(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter
) -> None:
    handler = MustNotRun()
    task_id, before = await a_job_of_a_dead_worker(api, worker_process)
    options = {"stalledInterval": 100, "maxStalledCount": 0}
    async with run_worker([task(handler, worker_options=options)]):
        after = await api.until_both_say(QUEUE, task_id, "failed")
    assert not handler.ran
    written = patch(before, after)
    assert is_now(written.pop("failedAt"))
    assert written.pop("error")["reason"] == "job stalled more than allowable limit"
    assert written == {"status": "failed"}
    job = await api.node.get_job(QUEUE, task_id)
    assert job is not None
    assert job["failedReason"] == "job stalled more than allowable limit"


async def test_handed_back_at_the_shutdown_deadline(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    gate = Gate()
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([task(hang)], worker_shutdown_grace=0.05) as worker:
        before = await api.until_both_say(QUEUE, task_id, "active")
        assert await worker.stop() == 4
    after = await api.db.row(task_id)
    assert patch(before, after) == {"status": "pending"}
    assert await api.node.get_state(QUEUE, task_id) == "delayed"
    assert datetime.fromisoformat(await due(redis, prefix, QUEUE, task_id)) <= datetime.now(UTC)
    async with run_worker([task(gate)]):
        gate.opened.set()
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["attempts"] == gate.contexts[0].attempt == 1


async def test_cancelled_when_it_is_picked_up(run_worker: RunWorker, api: Api) -> None:
    handler = MustNotRun()
    task_id = await api.schedule(QUEUE, attempts=3)
    await api.db.execute(
        """UPDATE tasks SET data = data || '{"status": "cancelled"}' WHERE id = %s""", task_id
    )
    before = await api.db.row(task_id)
    async with run_worker([task(handler)]):

        async def failed() -> bool:
            return await api.node.get_state(QUEUE, task_id) == "failed"

        await until(failed)
    assert not handler.ran
    assert await api.db.row(task_id) == before
    job = await api.node.get_job(QUEUE, task_id)
    assert job is not None
    assert (job["attemptsMade"], job["failedReason"]) == (1, "the task is cancelled")


async def test_handler_delayed_its_own_job(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> None:
        soon = int(datetime.now(UTC).timestamp() * 1000) + HOUR_MS
        await ctx.job.moveToDelayed(soon, ctx.job.token)
        raise DelayedError

    task_id = await api.schedule(QUEUE)
    before = await api.db.row(task_id)
    async with run_worker([task(handler)]):
        written = patch(before, await api.until_both_say(QUEUE, task_id, "delayed"))
    assert is_now(written.pop("startedAt"))
    assert written.pop("delayUntil") == await due(redis, prefix, QUEUE, task_id)
    assert written == {"status": "delayed", "attempts": 1}


async def test_a_job_that_its_handler_delayed_runs_again(run_worker: RunWorker, api: Api) -> None:
    contexts: list[TaskContext] = []

    async def handler(payload: Json, ctx: TaskContext) -> None:
        contexts.append(ctx)
        if len(contexts) < 3:
            soon = int(datetime.now(UTC).timestamp() * 1000) + 20
            await ctx.job.moveToDelayed(soon, ctx.job.token)
            raise DelayedError

    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["attempts"] == 1
    assert row["delayUntil"] is None
    assert [ctx.attempt for ctx in contexts] == [1, 1, 1]


async def test_handler_waits_for_children(run_worker: RunWorker, api: Api, prefix: str) -> None:
    child = Gate({"ready": True})

    async def parent(payload: Json, ctx: TaskContext) -> object:
        if values := await ctx.job.getChildrenValues():
            return list(values.values())
        family = {"id": ctx.task_id, "queue": f"{prefix}:{QUEUE}"}
        await api.node.add("children", {}, parent=family)
        if await ctx.job.moveToWaitingChildren(ctx.job.token, {}):
            raise WaitingChildrenError
        return None

    task_id = await api.schedule(QUEUE)
    before = await api.db.row(task_id)
    async with run_worker([task(parent), task(child, "children")]):
        await until(lambda: child.contexts)
        written = patch(before, await api.until_both_say(QUEUE, task_id, "pending"))
        assert await api.node.get_state(QUEUE, task_id) == "waiting-children"
        assert is_now(written.pop("startedAt"))
        assert written == {"attempts": 1}
        child.opened.set()
        row = await api.until_both_say(QUEUE, task_id, "completed")
    [result] = row["result"]["output"]
    assert result["output"] == {"ready": True}
