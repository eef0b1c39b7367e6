"""Outcomes that PostgreSQL refuses: never told to BullMQ, and never at the others' cost."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.recording import patches, recorder
from autoflow_worker.worker import hand_back, history
from tests.support.agreement import bull_jobs, differences
from tests.support.api import Api
from tests.support.database import Connection, Database, new_task_id
from tests.support.node import KEEP_ALL, Scheduled
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"

Json = dict[str, Any]
Logs = list[Any]


class Handler:
    """A handler that waits for its gate.

    Attributes:
        ran: how often each job's handler has started.
    """

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, payload: Json, ctx: TaskContext) -> object:
        self.ran[ctx.task_id] += 1
        await self.gate.wait()
        return payload

    def task(self, concurrency: int) -> TaskDefinition[Any]:
        return define_task(QUEUE, self, TaskOptions(concurrency=concurrency))


class Jobs:
    """The test's queue and its rows."""

    def __init__(self, api: Api, redis: Redis, prefix: str) -> None:
        self.api = api
        self.db = api.db
        self.redis = redis
        self.prefix = prefix

    async def schedule(self, count: int, **payload: object) -> list[str]:
        """Rows and jobs, as the API makes them; their ids."""
        jobs = [
            Scheduled({"n": n, **payload}, new_task_id(), attempts=3, opts=KEEP_ALL)
            for n in range(count)
        ]
        await self.db.insert_tasks(QUEUE, {job.task_id: job.payload for job in jobs})
        return await self.api.node.schedule_all(QUEUE, jobs)

    async def told(self) -> set[str]:
        """The jobs of which BullMQ has been told that they are finished."""
        base = f"{self.prefix}:{QUEUE}:"
        ids = [await self.redis.zrange(base + state, 0, -1) for state in ("completed", "failed")]
        return {str(job_id) for some in ids for job_id in some}

    async def told_too_early(self) -> set[str]:
        """The jobs of which BullMQ was told what their rows do not say."""
        # In this order: a row may be written in between, but BullMQ only after it.
        told, rows = await self.told(), await self.db.rows()
        return {i for i in told if rows.get(i, {}).get("status") not in ("completed", "failed")}

    async def until_told(self, *ids: str) -> None:
        async def all_told() -> bool:
            return await self.told() >= set(ids)

        await until(all_told, 60, message=f"{len(ids)} jobs to be finished")

    async def differences(self) -> list[str]:
        jobs = await bull_jobs(self.redis, self.prefix, QUEUE)
        return differences(await self.db.rows(), jobs)


@pytest.fixture
def jobs(api: Api, redis: Redis, prefix: str) -> Jobs:
    return Jobs(api, redis, prefix)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots wait for less, so that a test sees what comes after that."""
    monkeypatch.setattr(recorder, "START_PATIENCE", 0.2)
    monkeypatch.setattr(history, "REFUSAL_PATIENCE", 0.5)
    monkeypatch.setattr(hand_back, "RERUN_DELAY", 0.5)
    monkeypatch.setattr(hand_back, "RERUN_DELAY_MAX", 1.0)


def events(logs: Logs, event: str) -> Logs:
    return [entry for entry in logs if entry["event"] == event]


# -- ways to refuse rows ---------------------------------------------------------------------------


@asynccontextmanager
async def check(db: Database) -> AsyncIterator[None]:
    """A constraint that no completed row whose payload says `bad` meets."""
    bad = "data->'payload' ? 'bad' AND data->>'status' = 'completed'"
    await db.execute(f"ALTER TABLE tasks ADD CONSTRAINT no_bad CHECK (NOT ({bad}))")
    yield
    await db.execute("ALTER TABLE tasks DROP CONSTRAINT no_bad")


@asynccontextmanager
async def trigger(db: Database) -> AsyncIterator[None]:
    """A trigger that raises for such rows."""
    await db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'not this one'; END $$;"
        "CREATE TRIGGER refuse BEFORE UPDATE ON tasks FOR EACH ROW"
        " WHEN (NEW.data->'payload' ? 'bad' AND NEW.data->>'status' = 'completed')"
        " EXECUTE FUNCTION refuse()"
    )
    yield
    await db.execute("DROP TRIGGER refuse ON tasks")


@asynccontextmanager
async def locked(db: Database) -> AsyncIterator[None]:
    """Somebody holds such rows."""
    async with await Connection.connect(db.url) as other:
        await other.execute("SELECT FROM tasks WHERE data->'payload' ? 'bad' FOR UPDATE")
        yield
        await other.rollback()


Refusing = Callable[[Database], AbstractAsyncContextManager[None]]


# -- nothing is told too early ---------------------------------------------------------------------


async def test_a_check_for_a_moment_under_load(
    run_worker: RunWorker, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However slow the machine is: no work is done twice for it.
    monkeypatch.setattr(history, "REFUSAL_PATIENCE", 60.0)
    handler = Handler()
    ids = await jobs.schedule(400)
    async with run_worker([handler.task(20)]):
        await jobs.until_told(*list(await until(jobs.told))[:1])
        await jobs.db.execute(
            "ALTER TABLE tasks ADD CONSTRAINT by_mistake"
            " CHECK (data->>'status' <> 'completed') NOT VALID"
        )
        for _ in range(6):
            await asyncio.sleep(0.1)
            assert await jobs.told_too_early() == set()
        await jobs.db.execute("ALTER TABLE tasks DROP CONSTRAINT by_mistake")
        await jobs.until_told(*ids)
    assert await jobs.differences() == []
    assert await jobs.db.statuses() == {"completed": len(ids)}
    assert set(handler.ran.values()) == {1}


@pytest.mark.usefixtures("impatient")
async def test_a_column_that_has_to_be_filled_in(run_worker: RunWorker, jobs: Jobs) -> None:
    handler = Handler()
    with capture_logs() as logs:
        async with run_worker([handler.task(10)]):
            # A start would refuse it.
            await jobs.db.execute("ALTER TABLE tasks ADD COLUMN wanted text NOT NULL")
            ids = [await jobs.api.node.add(QUEUE, {"n": n}, jobId=f"job-{n}") for n in range(30)]
            await until(lambda: len(events(logs, "job_runs_again")) >= 10, 60)
            # Handlers did start; but nobody was told, as there is no row that could say it.
            assert handler.ran
            assert await jobs.told() == set()
            assert await jobs.db.rows() == {}
            await jobs.db.execute("ALTER TABLE tasks DROP COLUMN wanted")
            await jobs.until_told(*ids)
    assert await jobs.differences() == []
    refused = events(logs, "row_refused")
    assert {entry["sqlstate"] for entry in refused} == {"23502"}
    assert max(Counter(entry["row"] for entry in refused).values()) == 1


# -- the others go on ------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("refusing", [check, trigger, locked])
async def test_refused_rows_do_not_take_every_slot(
    run_worker: RunWorker, jobs: Jobs, refusing: Refusing
) -> None:
    handler = Handler()
    handler.gate.clear()
    bad = await jobs.schedule(20, bad=True)
    with capture_logs() as logs:
        async with run_worker([handler.task(20)]) as worker:
            await until(lambda: len(handler.ran) == 20)
            good = await jobs.schedule(200)
            async with refusing(jobs.db):
                handler.gate.set()
                await jobs.until_told(*good)
                assert await jobs.told() == set(good)
                assert worker.exit_code is None
                assert len(await jobs.redis.lrange(f"{jobs.prefix}:{QUEUE}:active", 0, -1)) >= 10
            await jobs.until_told(*bad)
    assert await jobs.differences() == []
    # What was handed back ran again; the other half waited with its slot, and did not.
    again = {job_id for job_id in bad if handler.ran[job_id] > 1}
    assert 0 < len(again) <= 10
    assert {entry["task_id"] for entry in events(logs, "job_runs_again")} == again
    if refusing is not locked:
        assert Counter(entry["row"] for entry in events(logs, "row_refused")) == Counter(bad)
        assert {entry["row"] for entry in events(logs, "row_written_at_last")} == set(bad)


@pytest.mark.usefixtures("impatient")
async def test_a_refused_row_at_concurrency_1(
    run_worker: RunWorker, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hand_back, "RERUN_DELAY", 600.0)
    monkeypatch.setattr(hand_back, "RERUN_DELAY_MAX", 600.0)
    handler = Handler()
    handler.gate.clear()
    [bad] = await jobs.schedule(1, bad=True)
    good = await jobs.schedule(20)
    async with run_worker([handler.task(1)]):
        async with check(jobs.db):
            handler.gate.set()
            await jobs.until_told(*good)
            # It waits for its turn, and its row says until when; the attempt is not used up.
            row = await jobs.api.until_both_say(QUEUE, bad, "delayed")
            due = await jobs.redis.zscore(f"{jobs.prefix}:{QUEUE}:delayed", bad)
            assert due is not None
            moment = (await jobs.db.task(bad)).delayUntil
            assert moment is not None
            assert moment == patches.iso(int(due) // 0x1000)
            assert (row["result"], row["completedAt"]) == (None, None)
            job = await jobs.api.node.get_job(QUEUE, bad)
            assert job is not None
            assert job["attemptsMade"] == 0
        await jobs.api.node.job(QUEUE, bad, "promote")
        await jobs.until_told(bad)
    assert handler.ran[bad] == 2
    row = await jobs.api.until_both_say(QUEUE, bad, "completed")
    assert row["attempts"] == 1
    assert await jobs.differences() == []


# -- what is said ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("impatient")
async def test_the_log_tells_of_a_refusal_without_the_rows_contents(
    run_worker: RunWorker, jobs: Jobs
) -> None:
    secret = "hunter2-is-nobodys-business"
    [bad] = await jobs.schedule(1, bad=secret)
    handler = Handler()
    handler.gate.clear()
    with capture_logs() as logs:
        async with run_worker([handler.task(1)]):
            async with check(jobs.db):
                handler.gate.set()
                await until(lambda: len(events(logs, "job_runs_again")) >= 2, 60)
            await jobs.until_told(bad)
    [refused] = events(logs, "row_refused")
    assert refused["log_level"] == "error"
    assert (refused["row"], refused["sqlstate"], refused["constraint"]) == (bad, "23514", "no_bad")
    assert refused["reason"] == ('new row for relation "tasks" violates check constraint "no_bad"')
    [written] = events(logs, "row_written_at_last")
    assert written["row"] == bad
    assert secret not in str(logs)


# -- stopping --------------------------------------------------------------------------------------


async def test_a_held_outcome_is_handed_back_at_the_deadline(
    run_worker: RunWorker, jobs: Jobs
) -> None:
    handler = Handler()
    [bad] = await jobs.schedule(1, bad=True)
    async with check(jobs.db):
        async with run_worker([handler.task(2)], worker_shutdown_grace=1) as worker:
            keeper = worker.service.recorder
            assert keeper is not None
            # Its next try is seconds away by then.
            await until(lambda: {w.times_put_off for w in keeper.outstanding} == {4})
            assert await worker.stop() == 4
        assert await jobs.told() == set()
        assert await jobs.db.status(bad) == "pending"
    async with run_worker([handler.task(2)]):
        await jobs.until_told(bad)
    assert await jobs.differences() == []
