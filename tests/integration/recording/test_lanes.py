"""When the recorder uses more than one connection."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from autoflow_worker.recording import patches
from autoflow_worker.recording.lane import LARGE_BATCH
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict, Write
from tests.support.database import Connection, Database, other_database
from tests.support.until import until

QUEUE = "a-queue"
NOON = 1_767_355_200_000  # 2026-01-02T12:00:00Z

# Writing the row `slow` takes until somebody lets go of an advisory lock.
GATE = """
CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.id = 'slow' THEN
    WHILE NOT pg_try_advisory_xact_lock(1) LOOP PERFORM pg_sleep(0.01); END LOOP;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER gate BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION gate();
"""


def active(row_id: str) -> Write:
    patch = patches.active_patch(now_ms=NOON, attempt=1)
    return Write(row_id, QUEUE, patch, patches.encode(patch))


@asynccontextmanager
async def recording(url: str, connections: int) -> AsyncIterator[StatusRecorder]:
    recorder = StatusRecorder(url, lanes=connections)
    await recorder.open(10)
    try:
        yield recorder
    finally:
        await recorder.close(60)


@asynccontextmanager
async def slow_row(db: Database) -> AsyncIterator[None]:
    """A row whose update takes as long as the block; `quick` and `quick-2` are as always."""
    for task_id in ("slow", "quick", "quick-2"):
        await db.insert_task(QUEUE, task_id=task_id)
    await db.execute(GATE)
    await db.execute("SELECT pg_advisory_lock(1)")
    try:
        yield
    finally:
        await db.execute("SELECT pg_advisory_unlock_all()")


async def test_a_slow_batch_does_not_hold_up_other_rows(db: Database) -> None:
    async with recording(db.url, 2) as recorder:
        async with slow_row(db):
            slow = recorder.submit(active("slow"))
            await until(lambda: recorder.is_writing(slow))
            assert await recorder.submit(active("quick")).settled is Verdict.WRITTEN
            assert await recorder.submit(active("quick-2")).settled is Verdict.WRITTEN
            assert not slow.settled.done()
        assert await slow.settled is Verdict.WRITTEN


async def test_a_row_in_a_slow_batch_keeps_its_order(db: Database) -> None:
    failed = patches.failed_patch(
        now_ms=NOON, attempt=1, error=patches.error_record("no reason", now_ms=NOON)
    )
    async with recording(db.url, 3) as recorder:
        async with slow_row(db):
            first = recorder.submit(active("slow"))
            await until(lambda: recorder.is_writing(first))
            second = recorder.submit(Write("slow", QUEUE, failed, patches.encode(failed)))
            assert await recorder.submit(active("quick")).settled is Verdict.WRITTEN
            assert not second.settled.done()
        assert await first.settled is Verdict.WRITTEN
        assert await second.settled is Verdict.WRITTEN
    assert await db.status("slow") == "failed"


async def test_a_lane_that_can_not_connect_takes_nothing(db: Database) -> None:
    async with recording(db.url, 2) as recorder, slow_row(db):
        slow = recorder.submit(active("slow"))
        await until(lambda: recorder.is_writing(slow))
        await allow_connections(db, allowed=False)
        try:
            quick = recorder.submit(active("quick"))
            await until(lambda: recorder.pool.failure)
            assert not recorder.is_writing(quick)
            await db.execute("SELECT pg_advisory_unlock(1)")
            assert await quick.settled is Verdict.WRITTEN
        finally:
            await allow_connections(db, allowed=True)


async def test_a_lane_that_finds_only_rows_of_another_batch_waits(db: Database) -> None:
    """It used to be woken again and again without a pause, which blocked the event loop."""
    tasks = [f"task-{number}" for number in range(2 * LARGE_BATCH)]
    await db.insert_tasks(QUEUE, {task: {} for task in tasks})
    async with recording(db.url, 3) as recorder:
        async with slow_row(db):
            # All of these are one batch, and then all that waits is of the same rows.
            first = [recorder.submit(active(task)) for task in ("slow", *tasks)]
            await until(lambda: recorder.is_writing(first[0]))
            again = [recorder.submit(active(task)) for task in tasks]
            # A further lane has looked through these as soon as it has written another row.
            assert await recorder.submit(active("quick")).settled is Verdict.WRITTEN
            assert not any(write.settled.done() for write in (*first, *again))
        written = await asyncio.gather(*(write.settled for write in (*first, *again)))
    assert set(written) == {Verdict.WRITTEN}


async def allow_connections(db: Database, *, allowed: bool) -> None:
    name = db.url.rpartition("/")[2]
    # A database can't be closed from inside.
    elsewhere = other_database(db.url, "postgres")
    async with await Connection.connect(elsewhere, autocommit=True) as connection:
        await connection.execute(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS {allowed}'.encode())
