"""`autoflow-worker reconcile`: rows that lie, and what BullMQ knows."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from click.testing import CliRunner
from redis.asyncio import Redis

from autoflow_worker import TaskContext, TaskOptions, UnrecoverableError, define_task
from autoflow_worker.broker.client import PipelinedRedis
from autoflow_worker.broker.kept_job import JobReader
from autoflow_worker.cli import DIFFERENCES_LEFT, cli
from autoflow_worker.errors import (
    DatabaseUnavailableError,
    DatabaseUnfitError,
    RedisUnavailableError,
    RedisUnfitError,
)
from autoflow_worker.operations import reconcile
from autoflow_worker.operations.reconcile_report import Difference, Settling
from autoflow_worker.recording.patches import own_row_id
from tests.support.agreement import bull_jobs, differences
from tests.support.api import Api
from tests.support.database import Connection, Database, new_task_id
from tests.support.node import Node, Scheduled
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.servers import OwnServer
from tests.support.until import until

QUEUE = "reports-render"
ACTIVE = (
    '{"status": "active", "result": null, "error": null, "completedAt": null, "failedAt": null}'
)
Json = dict[str, Any]


async def render(payload: Json, ctx: TaskContext) -> object:
    if payload.get("bad"):
        raise UnrecoverableError("no such report")
    if payload.get("bad once") and ctx.job.attemptsStarted == 1:
        raise UnrecoverableError("not yet")
    return {"pages": 3}


TASK = define_task(QUEUE, render, TaskOptions(concurrency=5))

Compare = Callable[..., Coroutine[Any, Any, dict[str, Difference]]]


@pytest.fixture
async def compare(
    redis_url: str, database_url: str, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Compare]:
    """`await compare(fix=..., lost=...)`: the differences, by row id."""
    # Nothing runs beside it, unless a test says so.
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 0.0)
    client = PipelinedRedis(redis_url)
    await client.open(30)

    async def run(**options: Any) -> dict[str, Difference]:
        found = reconcile.reconcile(client, database_url, prefix, **options)
        async with aclosing(found):
            return {difference.row_id: difference async for difference in found}

    yield run
    await client.aclose()


def told(found: dict[str, Difference]) -> dict[str, tuple[str, str, str]]:
    """What is said of each row."""
    return {row_id: (one.status, one.state, one.what) for row_id, one in found.items()}


def without_times(row: Json | None) -> Json:
    """A row but for the times of its end: BullMQ's are those of the acknowledgement."""
    row = dict(row or {})
    assert row.pop("completedAt") or row.pop("failedAt")
    row.pop("failedAt", None)
    return row | {"error": (row["error"] or {}) | {"lastAttemptAt": None}}


async def set_rows(db: Database, patch: str, *ids: str) -> None:
    await db.execute("UPDATE tasks SET data = data || %s::jsonb WHERE id = ANY(%s)", patch, [*ids])


# -- what BullMQ knows ---------------------------------------------------------------------------


async def test_rows_that_an_older_worker_left_behind_get_what_bullmq_knows(
    compare: Compare, api: Api, run_worker: RunWorker
) -> None:
    db = api.db
    done = await api.schedule(QUEUE, {})
    bad = await api.schedule(QUEUE, {"bad": True})
    async with run_worker([TASK]):
        await db.until_status(done, "completed")
        await db.until_status(bad, "failed")
    before = {row_id: await db.row(row_id) or {} for row_id in (done, bad)}
    waiting = await api.schedule(QUEUE, {})
    lost = await db.insert_task(QUEUE, {})
    # As the Node worker leaves them: the job is over, and its row says `active` for ever.
    await set_rows(db, ACTIVE, done, bad, waiting)

    gone = "the job was removed from Redis, or was never added; --lost says what becomes of the row"
    assert told(await compare()) == {
        done: ("active", "completed", "would set completed"),
        bad: ("active", "failed", "would set failed"),
        waiting: ("active", "prioritized", "would set pending"),
        lost: ("pending", "gone", f"would leave: {gone}"),
    }
    assert await db.status(done) == "active", "without fix, nothing is written"

    assert told(await compare(fix=True)) == {
        done: ("active", "completed", "set completed"),
        bad: ("active", "failed", "set failed"),
        waiting: ("active", "prioritized", "set pending"),
        lost: ("pending", "gone", f"left: {gone}"),
    }
    assert without_times(await db.row(done)) == without_times(before[done])
    assert without_times(await db.row(bad)) == without_times(before[bad])
    assert await db.status(waiting) == "pending"
    assert await db.status(lost) == "pending", "nobody knows what became of it"
    assert (await compare(fix=True)).keys() == {lost}


async def test_every_state_of_a_job_is_told_to_its_row(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    db, node = api.db, api.node
    running = asyncio.Event()

    async def run(payload: Json, ctx: TaskContext) -> None:
        running.set()
        await asyncio.Event().wait()

    async with run_worker([define_task("busy", run, TaskOptions(timeout_ms=None))]) as worker:
        active = await api.schedule("busy")
        await running.wait()
        shown = await db.row(active)
        delayed = await api.schedule(QUEUE, delay=3_600_000)
        due_row = await db.row(delayed) or {}
        promoted = await api.schedule(QUEUE, delay=3_600_000)
        await node.job(QUEUE, promoted, "promote")
        waiting = await db.insert_task(QUEUE, {}, status="active")
        await node.add(QUEUE, {}, jobId=waiting)
        await node.pause(QUEUE)
        paused = await db.insert_task(QUEUE, {}, status="active")
        await node.add(QUEUE, {}, jobId=paused)
        await set_rows(db, '{"status": "pending", "startedAt": null, "attempts": 0}', active)
        await set_rows(db, '{"status": "active", "delayUntil": null}', delayed)

        assert {row_id: one.what for row_id, one in (await compare(fix=True)).items()} == {
            active: "set active",
            delayed: "set delayed",
            promoted: "set pending",
            waiting: "set pending",
            paused: "set pending",
        }
        assert await db.row(active) == shown
        row = await db.row(delayed) or {}
        assert row["delayUntil"][:17] == due_row["delayUntil"][:17]
        assert (await db.row(promoted) or {})["delayUntil"] is None
        assert await compare() == {}
        await worker.abort()
    assert await db.status(active) == "pending"
    assert await compare() == {}, "a job that was handed back is no difference"


async def test_a_healthy_system_has_no_differences(compare: Compare, api: Api) -> None:
    await api.schedule(QUEUE, {})
    await api.schedule(QUEUE, {}, delay=3_600_000)
    assert await compare(fix=True, lost="requeue") == {}


async def test_beside_a_busy_worker_it_breaks_nothing(
    api: Api, run_worker: RunWorker, redis_url: str, redis: Redis, prefix: str
) -> None:
    async def flaky(payload: Json, ctx: TaskContext) -> int:
        await asyncio.sleep(0.05)
        if payload["fails"] >= ctx.attempt:
            raise ValueError("not yet")
        return ctx.attempt

    keep_all = {"removeOnComplete": False, "removeOnFail": False}
    jobs = [Scheduled({"fails": n % 4}, backoff=20, opts=keep_all) for n in range(300)]
    await api.db.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
    await api.node.schedule_all(QUEUE, jobs)
    client = PipelinedRedis(redis_url)
    await client.open(30)
    rounds: list[list[str]] = []
    async with run_worker([define_task(QUEUE, flaky, TaskOptions(concurrency=10))]):
        while set(await api.db.statuses()) - {"completed", "failed"}:
            found = reconcile.reconcile(client, api.db.url, prefix, fix=True, lost="fail")
            async with aclosing(found):
                rounds.append([difference.what async for difference in found])
        await until(lambda: all_acknowledged(redis, prefix))
    await client.aclose()

    # A job whose backoff has ended waits for its turn, which nobody tells its row before. The other
    # two are for a machine so busy that a worker takes a second from one store to the next.
    said = {what for found in rounds for what in found}
    assert said <= {"set pending", "set active", "set delayed"}
    assert await api.db.statuses() == {"completed": 225, "failed": 75}
    assert differences(await api.db.rows(), await bull_jobs(redis, prefix, QUEUE)) == []


async def all_acknowledged(redis: Redis, prefix: str) -> bool:
    return await redis.llen(f"{prefix}:{QUEUE}:active") == 0


async def test_a_row_that_changes_while_it_settles_is_no_difference(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await api.db.insert_task(QUEUE, {}, status="active")
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 1.0)
    comparing = asyncio.create_task(compare(fix=True, lost="fail"))
    while not comparing.done():
        await set_rows(api.db, "{}", task_id)
        await asyncio.sleep(0.05)
    assert await comparing == {}
    assert await api.db.status(task_id) == "active"


async def test_a_row_is_written_only_while_it_is_as_it_was_compared(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The API cancels the task after it was compared, before anything is done about it."""
    cancelled = await api.db.insert_task(QUEUE, {}, status="active")
    look = JobReader.look

    async def look_and_cancel(self: Any, *args: Any, **options: Any) -> Any:
        job = await look(self, *args, **options)
        if options["fields"]:
            await set_rows(api.db, '{"status": "cancelled"}', cancelled)
        return job

    monkeypatch.setattr(JobReader, "look", look_and_cancel)
    for lost in ("fail", "requeue", None):
        await set_rows(api.db, '{"status": "active"}', cancelled)
        assert await compare(fix=True, lost=lost) == {}
        assert await api.db.status(cancelled) == "cancelled"
    assert await api.node.get_job(QUEUE, cancelled) is None


async def test_jobs_of_rows_with_an_id_of_their_own_are_found(
    compare: Compare, api: Api, run_worker: RunWorker
) -> None:
    queue = "old:reports"
    task = define_task(queue, render)
    number = await api.node.add(queue, {})
    row_id = own_row_id(queue, number)
    # A job whose id is that of another queue's row has its story in a row of its own, too.
    theirs = await api.db.insert_task(QUEUE, {})
    await api.node.add(queue, {}, jobId=theirs)
    own = await api.db.insert_task(queue, {}, task_id=own_row_id(queue, theirs))
    async with run_worker([task]):
        await api.db.until_status(row_id, "completed")
        await until(lambda: has_finished(api.node, queue, theirs))
    await set_rows(api.db, ACTIVE, row_id, own)

    found = await compare(fix=True)

    assert {r: one.what for r, one in found.items() if r != theirs} == {
        row_id: "set completed",
        own: "set completed",
    }
    assert found[theirs].state == "gone", "the job is another queue's"


async def has_finished(node: Node, queue: str, job_id: str) -> bool:
    return await node.get_state(queue, job_id) == "completed"


# -- the API's retry of a job that BullMQ still keeps --------------------------------------------


async def test_a_retry_that_bullmq_ignored_is_made_good(
    compare: Compare,
    api: Api,
    run_worker: RunWorker,
    redis: Redis,
    prefix: str,
) -> None:
    task_id = await api.schedule(QUEUE, {"bad once": True})
    other = await api.schedule(QUEUE, {"bad": True})
    async with run_worker([TASK]):
        await api.until_both_say(QUEUE, task_id, "failed")
        await api.until_both_say(QUEUE, other, "failed")
    claims = await redis.hget(f"{prefix}:{QUEUE}:{task_id}", "ats")
    await api.retry(QUEUE, task_id)
    assert await api.node.get_state(QUEUE, task_id) == "failed", "BullMQ knows the id"
    row = await api.db.row(task_id)

    assert told(await compare()) == {task_id: ("pending", "failed", "would retry the job")}
    assert await api.node.get_state(QUEUE, task_id) == "failed", "without fix, nothing is done"
    assert told(await compare(fix=True)) == {task_id: ("pending", "failed", "retried the job")}

    assert await api.db.row(task_id) == row, "not failed again"
    assert await api.node.get_state(QUEUE, task_id) == "prioritized"
    fields = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    assert fields["ats"] == claims, "the claims are counted on"
    assert "atm" not in fields
    assert await compare() == {}
    async with run_worker([TASK]):
        done = await api.until_both_say(QUEUE, task_id, "completed")
    assert (done["attempts"], done["result"]["output"], done["error"]) == (1, {"pages": 3}, None)
    jobs = await bull_jobs(redis, prefix, QUEUE)
    assert differences(await api.db.rows(), jobs) == []


async def test_a_retry_on_which_bullmqs_script_breaks_costs_its_own_row_only(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    ids = sorted([await api.schedule(QUEUE, {"bad": True}) for _ in range(2)])
    async with run_worker([TASK]):
        for task_id in ids:
            await api.until_both_say(QUEUE, task_id, "failed")
    for task_id in ids:
        await api.retry(QUEUE, task_id)
    parent = f"{prefix}:{QUEUE}:parent"
    await redis.hset(f"{prefix}:{QUEUE}:{ids[0]}", "parentKey", parent)
    await redis.mset({parent: "", f"{parent}:unsuccessful": "no set"})

    found = await compare(fix=True)

    assert found[ids[0]].what.startswith("left: BullMQ's script breaks on the job: WRONGTYPE")
    assert found[ids[1]].what == "retried the job"


# -- jobs that can't be read ---------------------------------------------------------------------


async def test_jobs_that_cant_be_read_cost_their_own_row_only(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    ids = [await api.schedule(QUEUE, {}) for _ in range(8)]
    async with run_worker([TASK]):
        for task_id in ids:
            await api.until_both_say(QUEUE, task_id, "completed")
    base = f"{prefix}:{QUEUE}:"
    text, no_opts, no_result, no_times, no_fields, raw, no_job, good = ids
    await redis.delete(base + text)
    await redis.set(base + text, "no hash")
    await redis.hset(base + no_opts, mapping={"opts": "{", "data": "[", "timestamp": "never"})
    await redis.hset(base + no_result, "returnvalue", '{"success": tr')
    await redis.hset(base + no_times, mapping={"finishedOn": "0", "processedOn": "soon"})
    await redis.hdel(base + no_fields, *(await redis.hkeys(base + no_fields)))
    await redis.hset(base + no_fields, "x", "y")
    await redis.hset(base + raw, mapping={"returnvalue": b'"\xff\\u0000"', "atm": b"\xfe"})
    await redis.delete(base + no_job)
    hostile = await api.db.insert_task(QUEUE, {}, task_id="a\ufffdb")
    await set_rows(api.db, ACTIVE, *ids)

    found = await compare(fix=True)

    what = {row_id: one.what for row_id, one in found.items()}
    assert what.pop(text) == (
        "left: the job can't be read: a key of it, or of its queue, holds another type of data"
    )
    assert what.pop(no_result) == (
        "set completed, without the output, as the job's return value can't be read"
    )
    assert what.pop(no_job).startswith("left: the job's fields are gone")
    assert what.pop(hostile).startswith("left: ")
    assert what == dict.fromkeys((no_opts, no_times, no_fields, raw, good), "set completed")
    for row_id in (no_times, no_fields):
        row = await api.db.row(row_id) or {}
        assert row["completedAt"][:4] >= "2026", "BullMQ's set of completed jobs has the time"
    assert (await api.db.row(raw) or {})["result"]["output"] == "\ufffd\ufffd"


async def test_rows_that_name_no_queue_are_left(compare: Compare, db: Database) -> None:
    task_id = await db.insert_task("", {})
    assert told(await compare(fix=True, lost="fail")) == {
        task_id: ("pending", "-", "left: the row names no queue")
    }


# -- rows whose job is gone ----------------------------------------------------------------------


async def test_rows_whose_job_is_gone_fail(compare: Compare, api: Api) -> None:
    started = await api.db.insert_task(
        QUEUE, {}, status="active", startedAt="2026-01-02T03:04:05.678Z", attempts=2
    )
    assert told(await compare(lost="fail")) == {started: ("active", "gone", "would set failed")}
    assert await api.db.status(started) == "active"
    assert told(await compare(fix=True, lost="fail")) == {started: ("active", "gone", "set failed")}
    row = await api.db.row(started) or {}
    assert row["attempts"] == 2
    assert row["error"] == {
        "success": False,
        "reason": "the job is gone from Redis, so nobody can tell its end",
        "lastAttemptAt": "2026-01-02T03:04:05.678Z",
    }
    assert row["failedAt"] > row["enqueuedAt"]
    assert await compare() == {}


async def test_jobs_that_are_gone_are_added_again(
    compare: Compare, api: Api, run_worker: RunWorker, redis: Redis, prefix: str
) -> None:
    payload = {"n": 2**70, "text": "\u00e9\u20ac", "nested": [{"a": None}]}
    task_id = await api.db.insert_task(
        QUEUE, payload, status="active", priority="critical", maxAttempts=7, attempts=3
    )
    numbered = await api.db.insert_task(QUEUE, {}, task_id=own_row_id(QUEUE, "17"))
    refused = await api.db.insert_task(QUEUE, {}, task_id="17")
    later = await api.db.insert_task(
        QUEUE, {}, status="delayed", delayUntil="2999-01-01T00:00:00.000Z"
    )
    like_the_apis = await api.schedule("other", payload, priority="critical", attempts=7)

    found = await compare(lost="requeue")
    assert {
        row_id: one.what for row_id, one in found.items() if row_id != refused
    } == dict.fromkeys((task_id, numbered, later), "would add the job again")
    assert await bull_jobs(redis, prefix, QUEUE) == {}
    found = await compare(fix=True, lost="requeue")
    what = {row_id: one.what for row_id, one in found.items()}
    assert what.pop(refused).endswith("BullMQ takes no such id for a job: use --lost fail")
    assert what == dict.fromkeys((task_id, numbered, later), "added the job again")

    ours = await redis.hgetall(f"{prefix}:{QUEUE}:{task_id}")
    apis = await redis.hgetall(f"{prefix}:other:{like_the_apis}")
    assert ours.keys() == apis.keys()
    assert json.loads(ours["opts"]) == json.loads(apis["opts"]) | {"jobId": task_id}
    assert json.loads(ours["data"]).keys() == json.loads(apis["data"]).keys()
    assert (ours["name"], ours["priority"]) == (QUEUE, apis["priority"])
    assert await api.db.statuses() == {"pending": 4, "delayed": 1}
    assert (await compare()).keys() == {refused}
    assert await api.node.get_state(QUEUE, later) == "delayed"
    async with run_worker([TASK]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
        await api.until_both_say(QUEUE, numbered, "completed")
    assert (row["attempts"], row["payload"]) == (1, payload)


async def test_a_crash_after_the_row_was_written_leaves_it_as_lost_as_it_was(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = await api.db.insert_task(QUEUE, {}, status="active", attempts=2)

    async def crash(*_: object) -> None:
        raise asyncio.CancelledError

    with monkeypatch.context() as patched:
        patched.setattr(reconcile._Reconciler, "_add", crash)
        with pytest.raises(asyncio.CancelledError):
            await compare(fix=True, lost="requeue")
    assert await api.db.status(task_id) == "pending"
    assert (await compare(fix=True, lost="requeue")).keys() == {task_id}
    assert await api.node.get_state(QUEUE, task_id) == "prioritized"


# -- what stands in the way ----------------------------------------------------------------------


async def test_a_refused_change_costs_its_row_and_shows_nothing_of_it(
    compare: Compare, api: Api, database_url: str
) -> None:
    db = api.db
    refused, silent, locked, fine = [
        await db.insert_task(QUEUE, {"secret": "S3cr3t"}, task_id=f"{n}-{new_task_id()}")
        for n in range(4)
    ]
    await db.execute(
        "ALTER TABLE tasks ADD CONSTRAINT no_failures"
        f" CHECK (id <> '{refused}' OR data->>'status' <> 'failed')"
    )
    await db.execute(
        "CREATE FUNCTION keep() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
    )
    await db.execute(
        "CREATE TRIGGER keep BEFORE UPDATE ON tasks FOR EACH ROW"
        f" WHEN (OLD.id = '{silent}') EXECUTE FUNCTION keep()"
    )
    async with await Connection.connect(database_url) as holder:
        await holder.execute("SELECT FROM tasks WHERE id = %s FOR UPDATE", (locked,))
        found = await compare(fix=True, lost="fail")
    what = {row_id: one.what for row_id, one in found.items()}
    assert what == {
        refused: 'left: PostgreSQL refuses the change: new row for relation "tasks" violates check'
        ' constraint "no_failures"',
        silent: "left: PostgreSQL leaves the row as it is: a trigger or a policy",
        locked: "left: PostgreSQL refuses the change: canceling statement due to lock timeout",
        fine: "set failed",
    }
    assert found[refused].settling is Settling.LEFT


async def test_a_table_that_cant_be_written_is_told_once(compare: Compare, db: Database) -> None:
    await db.execute("ALTER TABLE tasks RENAME TO elsewhere")
    with pytest.raises(DatabaseUnfitError, match="there is no table 'tasks'"):
        await compare(fix=True)
    with pytest.raises(DatabaseUnfitError, match="tasks"):
        await compare()


@pytest.mark.parametrize("end", ["killed", "refuses"])
async def test_redis_goes_away_in_the_middle(
    end: str, own_redis: OwnServer, database_url: str, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SETTLING", 0.0)
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SUSPECTS", 1)
    monkeypatch.setattr("autoflow_worker.broker.channel.CONNECT_PATIENCE", 1.0)
    await db.insert_tasks(QUEUE, {new_task_id(): {} for _ in range(1500)})
    client = PipelinedRedis(own_redis.url)
    await client.open(30)
    found = reconcile.reconcile(client, database_url, "bull", fix=True, lost="fail")
    async with aclosing(found):
        await anext(found)
        if end == "killed":
            await own_redis.kill()
            with pytest.raises(RedisUnavailableError, match="Redis went away"):
                _ = [difference async for difference in found]
        else:
            async with Redis.from_url(own_redis.url) as admin:
                await admin.acl_setuser("default", commands=["-evalsha"])
            with pytest.raises(RedisUnfitError, match="evalsha"):
                _ = [difference async for difference in found]
    await client.aclose()


async def test_postgresql_goes_away_in_the_middle(
    compare: Compare, api: Api, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await api.db.insert_task(QUEUE, {})
    look = JobReader.look

    async def look_and_cut(self: Any, *args: Any, **options: Any) -> Any:
        if options["fields"]:
            await api.db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        return await look(self, *args, **options)

    monkeypatch.setattr(JobReader, "look", look_and_cut)
    with pytest.raises(DatabaseUnavailableError):
        await compare(fix=True, lost="fail")


# -- many rows -----------------------------------------------------------------------------------


async def test_pages_and_batches_leave_nothing_out(
    compare: Compare, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoflow_worker.operations.reconcile.PAGE", 7)
    monkeypatch.setattr("autoflow_worker.operations.reconcile.SUSPECTS", 10)
    ids = {new_task_id() for _ in range(100)}
    await api.db.insert_tasks(QUEUE, {task_id: {} for task_id in ids})
    await api.db.insert_tasks(QUEUE, {new_task_id(): {} for _ in range(50)}, status="completed")
    assert (await compare()).keys() == ids
    assert (await compare(fix=True, lost="fail")).keys() == ids
    assert await api.db.statuses() == {"failed": 100, "completed": 50}
    assert await compare() == {}


# -- the command ---------------------------------------------------------------------------------


def command(redis_url: str, database_url: str, prefix: str, *arguments: str) -> tuple[int, str]:
    environment = {"REDIS_URL": redis_url, "DATABASE_URL": database_url, "BULLMQ_PREFIX": prefix}
    result = CliRunner().invoke(
        cli, ["reconcile", *arguments], env=environment, standalone_mode=False
    )
    assert result.exception is None, result.output
    code: int = result.return_value
    return code, result.output


async def test_the_command_says_what_it_would_do_and_did(
    redis_url: str, database_url: str, prefix: str, db: Database
) -> None:
    def run(*arguments: str) -> Awaitable[tuple[int, str]]:
        return asyncio.to_thread(command, redis_url, database_url, prefix, *arguments)

    code, output = await run()
    assert code == 0
    assert output == "every row that is not finished agrees with its job\n"
    task_id = await db.insert_task(QUEUE, {})
    assert DIFFERENCES_LEFT == 5

    code, output = await run()
    assert code == 5
    assert f"{QUEUE}: would leave: the job was removed from Redis" in output
    assert output.endswith("1 row differs: 1 left\n")
    code, output = await run("--fix")
    assert code == 5
    assert output.endswith("1 row differs: 1 left\n")
    code, output = await run("--lost", "requeue")
    assert code == 5
    assert f"{QUEUE}: would add the job again" in output
    assert output.endswith("1 row differs: 1 can be settled with --fix\n")
    code, output = await run("--fix", "--lost", "requeue")
    assert code == 0
    assert output.splitlines()[1].startswith(task_id)
    assert output.endswith("1 row differs: 1 settled\n")
    assert await run() == (0, "every row that is not finished agrees with its job\n")


async def test_the_command_ends_with_one_message_when_a_server_is_away(
    worker_process: WorkerStarter,
) -> None:
    process = worker_process(
        "", command="reconcile", REDIS_URL="redis://127.0.0.1:1", WORKER_STARTUP_TIMEOUT="0.2"
    )
    assert await process.wait() == 3
    assert process.stderr.startswith("autoflow-worker: Redis can't be reached")
    assert "Traceback" not in process.stderr
