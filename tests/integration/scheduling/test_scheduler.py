"""Scheduling from Python: row and job as the API makes them (contract, sections 1, 2 and 5)."""

import asyncio
import json
from datetime import UTC, date, datetime
from typing import Any

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskScheduler, define_task
from autoflow_worker.errors import (
    PayloadError,
    SettingsError,
    WorkerError,
)
from tests.support.configured import ConfiguredRedis
from tests.support.database import Database
from tests.support.node import Node
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.scheduling import (
    QUEUE,
    Email,
    Invoice,
    Ticket,
    email,
    invoice,
    plain,
    ticket,
)


async def test_the_row_is_as_the_api_writes_it(scheduler: TaskScheduler, db: Database) -> None:
    before = datetime.now(UTC).replace(tzinfo=None)
    task_id = await scheduler.schedule(email, {"emailAddress": "ann@b.c"}, user_id="u-1")
    row = await db.row(task_id)
    assert row is not None
    enqueued_at = datetime.strptime(row.pop("enqueuedAt"), "%Y-%m-%dT%H:%M:%S.%f%z")
    assert abs((enqueued_at.replace(tzinfo=None) - before).total_seconds()) < 30
    assert row == {
        "schemaVersion": 1,
        "taskName": QUEUE,
        "queueName": QUEUE,
        "payload": {"emailAddress": "ann@b.c"},
        "status": "pending",
        "priority": "high",
        "attempts": 0,
        "maxAttempts": 5,
        "startedAt": None,
        "completedAt": None,
        "failedAt": None,
        "delayUntil": None,
        "result": None,
        "error": None,
        "userId": "u-1",
        "externalId": task_id,
    }
    [(created, updated)] = await db.fetch("SELECT created_at, updated_at FROM tasks")
    assert abs((created - before).total_seconds()) < 30
    assert created <= updated
    assert (await db.task(task_id)).userId == "u-1"


@pytest.mark.parametrize("delay_ms", [0, 60_000])
async def test_node_sees_the_same_job_as_from_a_node_producer(
    scheduler: TaskScheduler, node: Node, redis: Redis, prefix: str, delay_ms: int
) -> None:
    theirs_id = await node.schedule(
        QUEUE,
        {"emailAddress": "ann@b.c"},
        correlation_id="c",
        priority="high",
        attempts=5,
        backoff=700,
        delay=delay_ms or None,
    )
    ours_id = await scheduler.schedule(
        email, {"emailAddress": "ann@b.c"}, delay_ms=delay_ms, correlation_id="c"
    )
    assert len(ours_id) == len(theirs_id) == 21
    jobs, hashes = [], []
    for job_id in (theirs_id, ours_id):
        job = await node.get_job(QUEUE, job_id)
        fields = await redis.hgetall(f"{prefix}:{QUEUE}:{job_id}")
        assert job is not None
        opts = json.loads(fields.pop("opts"))
        assert job.pop("id") == opts.pop("jobId") == job["opts"].pop("jobId") == job_id
        assert abs(job.pop("timestamp") - int(fields.pop("timestamp"))) == 0
        jobs.append(job)
        hashes.append({**fields, "opts": opts, "data": json.loads(fields["data"])})
    assert jobs[1] == jobs[0]
    assert hashes[1] == hashes[0]
    states = [await node.get_state(QUEUE, job_id) for job_id in (theirs_id, ours_id)]
    assert states == ["delayed" if delay_ms else "prioritized"] * 2


async def test_a_delayed_task_says_until_when(
    scheduler: TaskScheduler, db: Database, node5: Node
) -> None:
    task_id = await scheduler.schedule(invoice, Invoice(7), delay_ms=3_600_000)
    task = await db.task(task_id)
    job = await node5.get_job("invoices-pay", task_id)
    assert job is not None
    assert task.status == "delayed"
    assert task.delayUntil is not None
    due = datetime.fromisoformat(task.delayUntil).timestamp() * 1000
    assert round(due) == job["timestamp"] + 3_600_000


async def test_the_worker_runs_it(
    scheduler: TaskScheduler, db: Database, run_worker: RunWorker, node5: Node
) -> None:
    await node5.listen(QUEUE)
    async with run_worker([email]):
        payload = Email(emailAddress="ann@example.com", born=date(2000, 1, 2))
        task_id = await scheduler.schedule(email, payload, user_id="u-2", correlation_id="c-2")
        late_id = await scheduler.schedule(email, payload, delay_ms=100)
        task = await db.until_status(task_id, "completed")
        late = await db.until_status(late_id, "completed")
    assert task.result is not None
    assert task.result.output == "example.com"
    assert (task.userId, task.attempts, task.delayUntil) == ("u-2", 1, None)
    assert late.startedAt is not None
    assert late.enqueuedAt < late.startedAt
    event = await node5.until_heard("completed", task_id)
    assert event.args["returnvalue"]["output"] == "example.com"
    assert (task.externalId, late.externalId) == (task_id, late_id)


@pytest.mark.parametrize(
    ("task", "payload", "stored"),
    [
        (email, {"emailAddress": "a@b.c"}, {"emailAddress": "a@b.c"}),
        (
            email,
            Email(emailAddress="a@b.c", born=date(2000, 1, 2)),
            {"emailAddress": "a@b.c", "born": "2000-01-02"},
        ),
        (
            invoice,
            Invoice(1, datetime(2026, 1, 2, tzinfo=UTC)),
            {"number": 1, "due": "2026-01-02T00:00:00Z"},
        ),
        (ticket, Ticket(title="\0 \ud83d\ude00 \udc00"), {"title": "\ufffd \U0001f600 \ufffd"}),
        (plain, {"n": float("nan"), "s": {1}}, {"n": None, "s": [1]}),
        (plain, {}, {}),
    ],
    ids=["object", "model", "dataclass", "typed dict", "not JSON's", "empty"],
)
async def test_payloads_of_every_kind(
    scheduler: TaskScheduler, db: Database, node5: Node, *, task: Any, payload: Any, stored: Any
) -> None:
    task_id = await scheduler.schedule(task, payload)
    job = await node5.get_job(task.queue_name, task_id)
    assert job is not None
    assert isinstance(job["data"].pop("correlationId"), str)
    assert job["data"] == (await db.task(task_id)).payload
    expected = stored if task is not email else {"born": None, **stored} | stored
    assert job["data"] == (stored if isinstance(payload, dict) else expected)


@pytest.mark.parametrize(
    ("task", "payload", "reason"),
    [
        (email, {"emailAddress": 1}, "emailAddress: "),
        (email, Invoice(1), "emailAddress: "),
        (plain, [1], "no JSON object, but a list"),
        (plain, "text", "no JSON object, but a str"),
        (plain, {"a": object()}, "can't be written as JSON"),
        (plain, {"correlationId": "c"}, "pass correlation_id="),
    ],
    ids=["field", "another type", "array", "text", "not JSON", "correlation id"],
)
async def test_a_payload_that_does_not_validate_leaves_nothing(
    scheduler: TaskScheduler,
    db: Database,
    redis: Redis,
    prefix: str,
    *,
    task: Any,
    payload: Any,
    reason: str,
) -> None:
    with pytest.raises(PayloadError, match=reason):
        await scheduler.schedule(task, payload)
    assert await db.rows() == {}
    assert [key async for key in redis.scan_iter(f"{prefix}:*", count=10_000)] == []


@pytest.mark.parametrize("delay_ms", [-1, 10**16])
async def test_a_delay_that_makes_no_sense(scheduler: TaskScheduler, delay_ms: int) -> None:
    with pytest.raises(WorkerError, match="delay_ms"):
        await scheduler.schedule(plain, {}, delay_ms=delay_ms)


async def test_hostile_ids_are_stored(scheduler: TaskScheduler, db: Database) -> None:
    task_id = await scheduler.schedule(plain, {}, user_id="\0\udc00", correlation_id="\0\udc00")
    assert (await db.task(task_id)).userId == "\ufffd\ufffd"


async def test_many_at_once(scheduler: TaskScheduler, db: Database, node5: Node) -> None:
    calls = [scheduler.schedule(plain, {"n": n}) for n in range(200)]
    ids = await asyncio.gather(*calls)
    assert (await db.rows()).keys() == set(ids)
    assert len(set(ids)) == 200
    assert (await node5.get_counts("anything"))["prioritized"] == 200


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://app:S3cret@S3cret@127.0.0.1:1/x",
        "postgresql://app:1234/S3cret@127.0.0.1:1/x",
        "host=127.0.0.1 port=1 password=S3cret",
    ],
)
async def test_a_database_url_that_can_not_be_read(url: str) -> None:
    with pytest.raises(SettingsError, match="database_url=") as caught:
        TaskScheduler(redis_url="127.0.0.1:1", database_url=url)
    assert "S3cret" not in str(caught.value)
    assert "1234" not in str(caught.value)


async def test_it_has_to_be_open(redis_url: str, database_url: str, db: Database) -> None:
    scheduler = TaskScheduler(redis_url=redis_url, database_url=database_url)
    with pytest.raises(WorkerError, match="not open"):
        await scheduler.schedule(plain, {})
    await scheduler.close()
    for _ in range(2):
        async with scheduler:
            await scheduler.schedule(plain, {})
    await scheduler.close()


async def test_a_unix_socket(database_url: str, db: Database) -> None:
    server = ConfiguredRedis()
    try:
        await asyncio.to_thread(server.start)
        async with TaskScheduler(
            redis_url=f"unix://{server.unix_socket}?db=3", database_url=database_url
        ) as scheduler:
            task_id = await scheduler.schedule(plain, {})
        async with Redis.from_url(server.url.replace("/0", "/3")) as client:
            assert await client.exists(f"bull:anything:{task_id}")
    finally:
        server.close()


async def test_the_command(worker_process: WorkerStarter, db: Database, node5: Node) -> None:
    tasks = """
        from pydantic import BaseModel
        from autoflow_worker import define_task

        class Payload(BaseModel):
            n: int

        async def handler(payload: Payload, ctx): ...

        tasks = [define_task("numbers", handler)]
    """
    options = ("--user-id", "u", "--correlation-id", "c", "--delay-ms", "60000")
    command = worker_process(tasks, "numbers", '{"n": 1}', *options, command="schedule")
    assert await command.wait() == 0, command.report()
    task_id = command.stdout.strip()
    assert await db.status(task_id) == "delayed"
    job = await node5.get_job("numbers", task_id)
    assert job is not None
    assert job["data"] == {"n": 1, "correlationId": "c"}
    refused = worker_process(None, "numbers", '{"n": "one"}', command="schedule")
    assert await refused.wait() == 2
    assert "n: " in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_a_payload_that_names_its_correlation_id(
    scheduler: TaskScheduler, db: Database, node5: Node
) -> None:
    class Named(BaseModel):
        n: int
        correlationId: str  # noqa: N815 - the field's name in a job

    async def handler(payload: Named, ctx: TaskContext) -> None: ...

    task = define_task("q", handler)
    by_payload = await scheduler.schedule(task, Named(n=1, correlationId="c"))
    by_argument = await scheduler.schedule(task, {"n": 1}, correlation_id="c")
    for task_id in (by_payload, by_argument):
        job = await node5.get_job("q", task_id)
        assert job is not None
        assert job["data"] == {"n": 1, "correlationId": "c"}
        assert (await db.task(task_id)).payload == {"n": 1}
