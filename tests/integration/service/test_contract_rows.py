"""Rows of jobs that have none yet, and what stays as it is: the contract's sections 4 and 2."""

from datetime import UTC, datetime

from autoflow_worker import TaskContext, UnrecoverableError
from tests.support.api import Api, Json
from tests.support.database import Database
from tests.support.handlers import QUEUE, Gate, task
from tests.support.row import TaskRow
from tests.support.running import RunWorker
from tests.support.until import until
from tests.support.written import is_now

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
