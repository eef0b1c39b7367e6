"""What each moment of a job writes: every row of the contract's sections 3 and 4.

A job's row is compared before and after, so that a test sees every key that was written.
"""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from autoflow_worker import (
    DelayedError,
    TaskContext,
    TaskDefinition,
    TaskOptions,
    UnrecoverableError,
    WaitingChildrenError,
    define_task,
)
from tests.support.api import Api, Json
from tests.support.database import Database
from tests.support.process import WorkerProcess, WorkerStarter
from tests.support.row import TaskRow
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "users-send-welcome-email"
HOUR_MS = 3_600_000

Handler = Callable[[Any, TaskContext], Awaitable[object]]


class Gate:
    """A handler that waits to be opened, and then returns or raises."""

    def __init__(self, outcome: object = None) -> None:
        self.outcome = outcome
        self.opened = asyncio.Event()
        self.contexts: list[TaskContext] = []

    async def __call__(self, payload: Json, ctx: TaskContext) -> object:
        self.contexts.append(ctx)
        await self.opened.wait()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class MustNotRun:
    """A handler that must not run; what a test raises inside one would not reach the test."""

    def __init__(self) -> None:
        self.ran = False

    async def __call__(self, payload: Json, ctx: TaskContext) -> None:
        self.ran = True


async def hang(payload: Json, ctx: TaskContext) -> None:
    await asyncio.Event().wait()


def task(
    handler: Handler,
    queue: str = QUEUE,
    *,
    worker_options: Any = None,
    **options: Any,
) -> TaskDefinition[Any]:
    return define_task(queue, handler, TaskOptions(**options), worker_options=worker_options)


def patch(before: Json | None, after: Json | None) -> Json:
    """The keys that were written, with their new values."""
    assert before is not None
    assert after is not None
    return {key: value for key, value in after.items() if before.get(key) != value}


def is_now(date: object) -> bool:
    """Whether a row's date is of the last minute."""
    moment = datetime.fromisoformat(str(date))
    return timedelta(0) <= datetime.now(UTC) - moment < timedelta(minutes=1)


def is_failure(error: Json, reason: str) -> bool:
    """Whether this is a raised exception's record, complete with where and when."""
    assert error.keys() == {"success", "reason", "stackTrace", "lastAttemptAt"}
    assert reason in error["stackTrace"]
    return error["reason"] == reason and is_now(error["lastAttemptAt"])


async def due(redis: Redis, prefix: str, queue: str, task_id: str) -> str:
    """When BullMQ will run a delayed job, as a row would say it."""
    score = await redis.zscore(f"{prefix}:{queue}:delayed", task_id)
    assert score is not None
    moment = datetime.fromtimestamp((int(score) >> 12) / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


# -- section 3 -----------------------------------------------------------------------------------


async def test_picked_up(run_worker: RunWorker, api: Api) -> None:
    gate = Gate()
    task_id = await api.schedule(QUEUE)
    before = await api.db.row(task_id)
    async with run_worker([task(gate)]):
        written = patch(before, await api.until_both_say(QUEUE, task_id, "active"))
        assert is_now(written.pop("startedAt"))
        assert written == {"status": "active", "attempts": 1}
        gate.opened.set()
        await api.until_both_say(QUEUE, task_id, "completed")


async def test_the_row_is_active_when_the_handler_starts(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> str | None:
        return await api.db.status(ctx.task_id)

    task_id = await api.schedule(QUEUE)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["result"]["output"] == "active"


async def test_handler_returned(run_worker: RunWorker, api: Api) -> None:
    gate = Gate({"sent": True, "to": ["a@b.c", None, 1.5, {"ü": "\U0001f600"}]})
    task_id = await api.schedule(QUEUE, {"email": "a@b.c"})
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        written = patch(before, await api.until_both_say(QUEUE, task_id, "completed"))
    assert is_now(written.pop("completedAt"))
    assert type(written["result"].pop("duration")) is int
    assert written == {
        "status": "completed",
        "result": {"success": True, "output": gate.outcome},
    }


async def test_handler_returned_after_failing(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> int:
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt} of {ctx.max_attempts}")
        return ctx.attempt

    task_id = await api.schedule(QUEUE, attempts=3, backoff=10)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["attempts"] == 3
    assert row["result"]["output"] == 3
    assert (row["error"], row["failedAt"], row["delayUntil"]) == (None, None, None)


async def test_handler_raised_and_will_run_again_after_a_backoff(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    gate = Gate(ValueError("no such user"))
    task_id = await api.schedule(QUEUE, attempts=3, backoff=HOUR_MS)
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "delayed")
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert written.pop("delayUntil") == await due(redis, prefix, QUEUE, task_id)
    assert written == {"status": "delayed"}
    assert after["attempts"] == 1


async def test_handler_raised_and_will_run_again_at_once(run_worker: RunWorker, api: Api) -> None:
    gate, other = Gate(ValueError("no such user")), "more-urgent"

    async def handler(payload: Json, ctx: TaskContext) -> object:
        return await (hang if payload.get("hang") else gate)(payload, ctx)

    task_id = await api.schedule(QUEUE, attempts=2, backoff=0)
    async with run_worker([task(handler, concurrency=1)], worker_shutdown_grace=0.01) as worker:
        before = await api.until_both_say(QUEUE, task_id, "active")
        # The only slot takes this one next, so that the first job is seen waiting.
        await api.schedule(QUEUE, {"hang": True}, task_id=other, priority="critical")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "pending")
        assert await api.node.get_state(QUEUE, task_id) == "prioritized"
        await api.until_both_say(QUEUE, other, "active")
        await worker.stop()
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert written == {"status": "pending"}
    assert after["attempts"] == 1


async def test_handler_raised_and_no_attempt_is_left(run_worker: RunWorker, api: Api) -> None:
    gate = Gate(ValueError("no such user"))
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "failed")
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert is_now(written.pop("failedAt"))
    assert written == {"status": "failed"}
    assert after["attempts"] == 1


async def test_handler_raised_on_every_attempt(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    task_id = await api.schedule(QUEUE, attempts=3, backoff=10)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["attempts"] == 3
    assert is_failure(row["error"], "attempt 3")


async def test_handler_raised_unrecoverably(run_worker: RunWorker, api: Api) -> None:
    gate = Gate(UnrecoverableError("the account is closed"))
    gate.opened.set()
    task_id = await api.schedule(QUEUE, attempts=3)
    async with run_worker([task(gate)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["attempts"] == 1
    assert is_now(row["failedAt"])
    assert is_failure(row["error"], "the account is closed")


class WelcomeEmail(BaseModel):
    email: str
    name: str
    age: int = 0


async def test_payload_does_not_validate(run_worker: RunWorker, api: Api) -> None:
    handler = MustNotRun()
    task_id = await api.schedule(QUEUE, {"email": "a@b.c", "age": "old"}, attempts=3)
    before = await api.db.row(task_id)
    async with run_worker([define_task(QUEUE, handler, payload=WelcomeEmail)]):
        written = patch(before, await api.until_both_say(QUEUE, task_id, "failed"))
    assert not handler.ran
    assert is_now(written.pop("failedAt"))
    reason = written.pop("error")["reason"]
    assert "name: " in reason
    assert "age: " in reason
    assert "email: " not in reason
    assert written == {"status": "failed", "attempts": 1}


@pytest.mark.parametrize(
    ("attempts", "backoff", "status"), [(2, HOUR_MS, "delayed"), (1, HOUR_MS, "failed")]
)
async def test_handler_ran_past_its_time_limit(
    run_worker: RunWorker, api: Api, attempts: int, backoff: int, status: str
) -> None:
    task_id = await api.schedule(QUEUE, attempts=attempts, backoff=backoff)
    async with run_worker([task(hang, timeout_ms=50)]):
        row = await api.until_both_say(QUEUE, task_id, status)
    assert row["attempts"] == 1
    assert "time limit of 50 ms" in row["error"]["reason"]


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


# -- section 4 -----------------------------------------------------------------------------------


async def test_a_job_without_a_row_gets_one(run_worker: RunWorker, api: Api) -> None:
    gate = Gate("done")
    task_id = await api.node.schedule(
        QUEUE,
        {"email": "a@b.c", "nested": {"correlationId": "kept"}},
        task_id="not-of-the-api",
        priority="high",
        attempts=4,
        correlation_id="c-1",
    )
    job = await api.node.get_job(QUEUE, task_id)
    assert job is not None
    async with run_worker([task(gate)]):
        await api.until_both_say(QUEUE, task_id, "active")
        row = await api.db.task(task_id)
        gate.opened.set()
        await api.until_both_say(QUEUE, task_id, "completed")
    added = datetime.fromtimestamp(job["timestamp"] / 1000, UTC)
    assert row == TaskRow(
        schemaVersion=1,
        taskName=QUEUE,
        queueName=QUEUE,
        payload={"email": "a@b.c", "nested": {"correlationId": "kept"}},
        status="active",
        priority="high",
        attempts=1,
        maxAttempts=4,
        enqueuedAt=added.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        startedAt=row.startedAt,
        completedAt=None,
        failedAt=None,
        delayUntil=None,
        result=None,
        error=None,
        userId=None,
        externalId=None,
    )


async def test_a_job_with_nothing_said_gets_the_defaults(run_worker: RunWorker, api: Api) -> None:
    job_id = await api.node.add(QUEUE, {"n": 1}, jobId="my-own-id")
    async with run_worker([task(Gate(ValueError("no")))]) as worker:
        await api.until_both_say(QUEUE, job_id, "active")
        await worker.abort()
    row = await api.db.task(job_id)
    assert (row.priority, row.maxAttempts, row.payload) == ("normal", 1, {"n": 1})


async def test_integer_ids_of_two_queues_get_two_rows(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> object:
        return [ctx.task_id, payload["n"]]

    for n, queue in enumerate(("a", "b")):
        assert await api.node.add(queue, {"n": n}) == "1"
    async with run_worker([task(handler, "a"), task(handler, "b")]):
        rows = [
            await api.until_both_say(queue, "1", "completed", row_id=f"{queue}~1")
            for queue in ("a", "b")
        ]
    assert [row["result"]["output"] for row in rows] == [["1", 0], ["1", 1]]
    assert [row["taskName"] for row in rows] == ["a", "b"]
    assert (await api.db.rows()).keys() == {"a~1", "b~1"}


async def test_jobs_without_a_row_go_without_when_the_setting_is_off(
    run_worker: RunWorker, api: Api
) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> None:
        if payload["n"] == 1:
            raise UnrecoverableError("no")

    known = await api.schedule(QUEUE, {"n": 0})
    unknown = [
        await api.node.schedule(QUEUE, {"n": n}, task_id=f"not-of-the-api-{n}") for n in (0, 1)
    ]
    async with run_worker([task(handler)], record_unknown_jobs=False):
        await api.until_both_say(QUEUE, known, "completed")

        async def states() -> bool:
            found = [await api.node.get_state(QUEUE, task_id) for task_id in unknown]
            return found == ["completed", "failed"]

        await until(states)
    assert (await api.db.rows()).keys() == {known}


# -- section 2 -----------------------------------------------------------------------------------


async def test_the_worker_merges_and_never_replaces(run_worker: RunWorker, api: Api) -> None:
    gate = Gate()
    task_id = await api.schedule(QUEUE, {"n": 1})
    async with run_worker([task(gate)]):
        await api.until_both_say(QUEUE, task_id, "active")
        await api.db.execute(
            """UPDATE tasks SET data = data || '{"userId": "u-1", "externalId": "e-1"}'"""
            " WHERE id = %s",
            task_id,
        )
        gate.opened.set()
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert (row["userId"], row["externalId"], row["payload"]) == ("u-1", "e-1", {"n": 1})


async def test_timestamps_are_in_utc_whatever_the_session_says(
    run_worker: RunWorker, api: Api, database_url: str
) -> None:
    known = await api.schedule(QUEUE)
    unknown = await api.node.schedule(QUEUE, task_id="not-of-the-api")
    await api.db.execute("UPDATE tasks SET created_at = '2020-01-01', updated_at = '2020-01-01'")
    gate = Gate()
    gate.opened.set()
    elsewhere = f"{database_url}?options=-c%20timezone%3DAsia/Tokyo"
    async with run_worker([task(gate)], database_url=elsewhere):
        await api.until_both_say(QUEUE, known, "completed")
        await api.until_both_say(QUEUE, unknown, "completed")
    times: dict[str, list[datetime]] = {
        row[0]: [moment.replace(tzinfo=UTC) for moment in row[1:]]
        for row in await api.db.fetch("SELECT id, created_at, updated_at FROM tasks")
    }
    assert times[known][0].year == 2020
    assert is_now(times[known][1])
    assert all(map(is_now, times[unknown]))


async def test_the_table_is_not_touched(
    run_worker: RunWorker, api: Api, db: Database, database_url: str
) -> None:
    describe = (
        "SELECT attname::text, atttypid::int FROM pg_attribute WHERE attrelid = 'tasks'::regclass"
        " UNION ALL SELECT indexdef, 0 FROM pg_indexes WHERE tablename = 'tasks' ORDER BY 1"
    )
    before = await db.fetch(describe)
    gate = Gate()
    gate.opened.set()
    task_id = await api.schedule(QUEUE)
    async with run_worker([task(gate)]):
        await api.until_both_say(QUEUE, task_id, "completed")
    assert await db.fetch(describe) == before


async def test_the_correlation_id_is_no_payload(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> object:
        return [payload, ctx.correlation_id]

    task_id = await api.schedule(QUEUE, {"n": 1}, correlation_id="c-1")
    without = await api.node.add(QUEUE, {"n": 2}, jobId="no-correlation-id")
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
        other = await api.until_both_say(QUEUE, without, "completed")
    assert row["result"]["output"] == [{"n": 1}, "c-1"]
    payload, generated = other["result"]["output"]
    assert payload == {"n": 2}
    assert generated
