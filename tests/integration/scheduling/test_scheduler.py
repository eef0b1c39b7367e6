"""Scheduling from Python: row and job as the API makes them (contract, sections 1, 2 and 5)."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import pytest
from pydantic import BaseModel, Field, computed_field
from redis.asyncio import Redis
from typing_extensions import TypedDict

from autoflow_worker import TaskContext, TaskOptions, TaskScheduler, define_task
from autoflow_worker.broker import channel
from autoflow_worker.errors import (
    DatabaseUnavailableError,
    DatabaseUnfitError,
    PayloadError,
    RedisUnavailableError,
    RedisUnfitError,
    SettingsError,
    WorkerError,
)
from autoflow_worker.recording import new_rows
from autoflow_worker.scheduling import scheduler as scheduler_module
from tests.support.configured import ConfiguredRedis
from tests.support.database import Database
from tests.support.node import Node
from tests.support.process import WorkerStarter
from tests.support.proxy import Proxy
from tests.support.running import RunWorker
from tests.support.servers import OwnServer
from tests.support.until import PATIENCE, until

QUEUE = "users-send-welcome-email"


class Email(BaseModel):
    address: str = Field(alias="emailAddress")
    born: date | None = None

    @computed_field  # type: ignore[prop-decorator]  # mypy's own limit
    @property
    def domain(self) -> str:
        return self.address.partition("@")[2]


@dataclass
class Invoice:
    number: int
    due: datetime | None = None


class Ticket(TypedDict):
    title: str


async def send(payload: Email, ctx: TaskContext) -> str:
    return payload.domain


async def pay(payload: Invoice, ctx: TaskContext) -> int:
    return payload.number


async def triage(payload: Ticket, ctx: TaskContext) -> None: ...


async def anything(payload: dict[str, Any], ctx: TaskContext) -> None: ...


email = define_task(
    QUEUE, send, TaskOptions(priority="high", max_attempts=5, backoff_ms=700, concurrency=5)
)
invoice = define_task("invoices-pay", pay)
ticket = define_task("tickets-triage", triage)
plain = define_task("anything", anything)


@pytest.fixture
async def scheduler(redis_url: str, database_url: str, prefix: str) -> AsyncIterator[TaskScheduler]:
    async with TaskScheduler(
        redis_url=redis_url, database_url=database_url, prefix=prefix
    ) as opened:
        yield opened


def wait_for_servers(patch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in (scheduler_module, new_rows):
        patch.setattr(module, "PATIENCE", seconds)
    patch.setattr(channel, "CONNECT_PATIENCE", seconds)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that comes back has the time that a busy machine needs."""
    wait_for_servers(monkeypatch, PATIENCE)


@contextmanager
def impatience() -> Iterator[None]:
    """Where a server does not come back, that is known soon."""
    with pytest.MonkeyPatch.context() as patch:
        wait_for_servers(patch, 0.1)
        yield


async def job_ids(redis: Redis, prefix: str) -> set[str]:
    """The ids of all jobs, from their hashes."""
    found = set()
    async for key in redis.scan_iter(f"{prefix}:*", count=10_000):
        if await redis.type(key) == "hash" and await redis.hexists(key, "opts"):
            found.add(key.rpartition(":")[2])
    return found


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


async def test_an_unreachable_redis(database_url: str, db: Database) -> None:
    scheduler = TaskScheduler(redis_url="redis://127.0.0.1:1", database_url=database_url)
    with pytest.raises(RedisUnavailableError):
        await scheduler.open(0.1)


async def test_an_unreachable_database(redis_url: str) -> None:
    url = "postgresql://x:S3cret@127.0.0.1:1/x"
    scheduler = TaskScheduler(redis_url=redis_url, database_url=url)
    with pytest.raises(DatabaseUnavailableError) as caught:
        await scheduler.open()
    assert "S3cret" not in str(caught.value)


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


async def test_it_has_to_be_open(redis_url: str, database_url: str) -> None:
    scheduler = TaskScheduler(redis_url=redis_url, database_url=database_url)
    with pytest.raises(WorkerError, match="not open"):
        await scheduler.schedule(plain, {})
    await scheduler.close()
    async with scheduler:
        pass
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


async def test_redis_away_before_anything_is_written(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler:
        await own_redis.stop()
        with impatience(), pytest.raises(RedisUnavailableError):
            await scheduler.schedule(plain, {})
        assert await db.rows() == {}
        await own_redis.start()
        assert await scheduler.schedule(plain, {}) in await db.rows()


async def test_redis_that_refuses_for_a_while(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with (
        TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler,
        Redis.from_url(own_redis.url) as client,
    ):
        await client.config_set("maxmemory", 1)
        scheduling = asyncio.create_task(scheduler.schedule(plain, {}))
        await until(db.rows)
        await client.config_set("maxmemory", 0)
        task_id = await scheduling
        assert await db.status(task_id) == "pending"
        assert await client.exists(f"bull:anything:{task_id}")


async def test_redis_that_refuses_for_good(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with (
        TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler,
        Redis.from_url(own_redis.url) as client,
    ):
        await client.config_set("maxmemory", 1)
        with impatience(), pytest.raises(RedisUnavailableError, match="could not be added"):
            await scheduler.schedule(plain, {}, delay_ms=1000)
        [task_id] = await db.rows()
        task = await db.task(task_id)
        assert (task.status, task.attempts, task.externalId) == ("failed", 0, None)
        assert task.failedAt is not None
        assert task.error is not None
        assert task.error.reason.startswith("the job could not be added: OOM")


async def test_a_queue_that_can_not_take_jobs(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    await redis.set(f"{prefix}:anything:prioritized", "no sorted set")
    with pytest.raises(RedisUnfitError, match="WRONGTYPE"):
        await scheduler.schedule(plain, {})
    assert await db.statuses() == {"failed": 1}


async def test_a_lost_reply_is_no_lost_job_and_no_second_one(
    redis_url: str, redis: Redis, database_url: str, db: Database, *, prefix: str, node5: Node
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(redis_url=proxy.url, database_url=database_url, prefix=prefix) as scheduler,
    ):
        ambush = proxy.lose_reply_to(b"the-lost-one")
        task_id = await scheduler.schedule(plain, {"which": "the-lost-one"})
        assert ambush.count >= 2
    assert await job_ids(redis, prefix) == {task_id}
    assert await node5.get_state("anything", task_id) == "prioritized"
    assert (await db.task(task_id)).externalId == task_id


async def test_a_job_of_unknown_fate_that_exists_after_all(
    redis_url: str,
    database_url: str,
    db: Database,
    *,
    prefix: str,
    run_worker: RunWorker,
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(redis_url=proxy.url, database_url=database_url, prefix=prefix) as scheduler,
    ):
        proxy.lose_reply_to(b"the-lost-one")
        await proxy.refuse()
        with impatience(), pytest.raises(RedisUnavailableError):
            await scheduler.schedule(plain, {"which": "the-lost-one"})
    [task_id] = await db.rows()
    assert await db.status(task_id) == "failed"
    async with run_worker([plain]):
        task = await db.until_status(task_id, "completed")
    assert (task.error, task.failedAt) == (None, None)


async def test_a_caller_that_is_cancelled_leaves_a_task_that_runs(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    for turns in range(30):
        call = asyncio.create_task(scheduler.schedule(plain, {"turns": turns}))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
    await scheduler.close()
    rows = await db.rows()
    assert await job_ids(redis, prefix) == rows.keys()
    assert rows
    assert all(row["externalId"] == task_id for task_id, row in rows.items())


async def test_a_cancelled_caller_whose_job_can_not_be_added(
    own_redis: OwnServer, database_url: str, db: Database
) -> None:
    async with TaskScheduler(redis_url=own_redis.url, database_url=database_url) as scheduler:
        async with Redis.from_url(own_redis.url) as client:
            await client.config_set("maxmemory", 1)
        with impatience():
            call = asyncio.create_task(scheduler.schedule(plain, {}))
            await asyncio.sleep(0)  # It has begun.
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await scheduler.close()
    assert await db.statuses() == {"failed": 1}


async def test_a_connection_to_postgresql_that_breaks(
    scheduler: TaskScheduler, db: Database
) -> None:
    await scheduler.schedule(plain, {})
    for _ in range(3):
        await db.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        task_id = await scheduler.schedule(plain, {})
        assert (await db.task(task_id)).externalId == task_id


async def test_postgresql_away(
    own_postgres: OwnServer, redis_url: str, redis: Redis, prefix: str
) -> None:
    async with TaskScheduler(
        redis_url=redis_url, database_url=own_postgres.url, prefix=prefix
    ) as scheduler:
        await own_postgres.stop()
        with impatience(), pytest.raises(DatabaseUnavailableError):
            await scheduler.schedule(plain, {})
        assert await job_ids(redis, prefix) == set()
        await own_postgres.start()
        task_id = await scheduler.schedule(plain, {})
        assert await job_ids(redis, prefix) == {task_id}


async def test_postgresql_away_after_the_job_was_added(
    own_postgres: OwnServer, redis_url: str, redis: Redis, prefix: str
) -> None:
    async with (
        Proxy(redis_url) as proxy,
        TaskScheduler(
            redis_url=proxy.url, database_url=own_postgres.url, prefix=prefix
        ) as scheduler,
    ):
        ambush = proxy.hold_reply_to(b"the-held-one")
        scheduling = asyncio.create_task(scheduler.schedule(plain, {"which": "the-held-one"}))
        await ambush.sprung.wait()
        await own_postgres.stop()
        ambush.release()
        with impatience():
            task_id = await scheduling
        assert await job_ids(redis, prefix) == {task_id}
    await own_postgres.start()


async def test_a_database_without_the_table(
    scheduler: TaskScheduler, db: Database, redis: Redis, prefix: str
) -> None:
    await db.execute("DROP TABLE tasks")
    with pytest.raises(DatabaseUnfitError, match='"tasks" does not exist'):
        await scheduler.schedule(plain, {})
    assert await job_ids(redis, prefix) == set()


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
