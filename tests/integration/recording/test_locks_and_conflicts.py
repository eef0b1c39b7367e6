"""Rows and tables that others hold, statements that take too long, connections that end."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict
from tests.support.database import Connection, Database, task_data
from tests.support.recording import (
    QUEUE,
    SPY,
    active,
    completed,
    failed,
    insert_many,
    new,
    recording,
    settled,
    spied,
    submit,
    transactions,
    with_settings,
    write,
)
from tests.support.until import until


@asynccontextmanager
async def locked(db: Database, statement: str) -> AsyncIterator[Connection]:
    """A session of somebody else that holds a lock for the length of the block."""
    async with await Connection.connect(db.url) as other:
        await other.execute(statement)
        yield other
        await other.rollback()


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM tasks WHERE id = 'task-57' FOR UPDATE",
        "UPDATE tasks SET updated_at = now() WHERE id = 'task-57'",
        "DELETE FROM tasks WHERE id = 'task-57'",
    ],
)
async def test_a_row_that_somebody_holds_does_not_hold_up_the_others(
    keeper: StatusRecorder, db: Database, statement: str
) -> None:
    tasks = await insert_many(db, 200)
    await db.execute(SPY)
    async with locked(db, statement):
        held = keeper.submit(write("task-57", completed()))
        others = [task for task in tasks if task != "task-57"]
        for patch in (active(), completed()):
            verdicts = await submit(keeper, *(write(task, patch) for task in others))
            assert set(verdicts) == {Verdict.WRITTEN}
        assert not held.settled.done()
        # The locked row is not found by trying halves, each of which would wait for it.
        assert await transactions(db) <= 4
    assert await settled(held) == [Verdict.WRITTEN]
    assert await db.statuses() == {"completed": 200}


async def test_writes_of_a_locked_row_keep_their_order(
    keeper: StatusRecorder, db: Database
) -> None:
    task = await db.insert_task(QUEUE)
    await db.execute(SPY)
    async with locked(db, "SELECT * FROM tasks FOR UPDATE"):
        first = keeper.submit(write(task, active()))
        await until(lambda: first.is_put_off)
        second = keeper.submit(write(task, completed()))
    assert await settled(first, second) == [Verdict.WRITTEN, Verdict.WRITTEN]
    assert await spied(db, "status") == ["active", "completed"]


async def test_a_row_that_is_just_being_inserted(keeper: StatusRecorder, db: Database) -> None:
    other = await db.insert_task(QUEUE)
    row = task_data(QUEUE, {"whose": "theirs"})
    ours = task_data(QUEUE, {"whose": "ours"})
    async with await Connection.connect(db.url) as their:
        await their.execute("INSERT INTO tasks VALUES ('new', %s)", (json.dumps(row),))
        held = keeper.submit(write("new", active(), new_row=new(ours)))
        assert await submit(keeper, write(other, active())) == [Verdict.WRITTEN]
        assert await submit(keeper, write(other, completed())) == [Verdict.WRITTEN]
        assert not held.settled.done()
    assert await settled(held) == [Verdict.WRITTEN]
    assert await db.row("new") == row | active()


@pytest.mark.parametrize("mode", ["ACCESS EXCLUSIVE", "SHARE"])
async def test_a_locked_table_is_waited_for(
    keeper: StatusRecorder, db: Database, mode: str
) -> None:
    tasks = await insert_many(db, 50)
    async with locked(db, f"LOCK TABLE tasks IN {mode} MODE"):
        writes = [keeper.submit(write(task, completed())) for task in tasks]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(2):
                await asyncio.shield(writes[0].settled)
        # No row is to blame for it.
        assert not any(each.times_put_off for each in writes)
    assert set(await settled(*writes)) == {Verdict.WRITTEN}
    assert await submit(keeper, write(tasks[0], failed())) == [Verdict.WRITTEN]


async def test_a_statement_that_takes_too_long_is_written_in_parts(db: Database) -> None:
    tasks = await insert_many(db, 50)
    # The session's first ten updates of these take 0.15 s each.
    slow = [await db.insert_task(QUEUE, {"hold": 0.15, "times": 10}) for _ in range(4)]
    await db.execute(SPY)
    async with recording(with_settings(db.url, statement_timeout="250ms")) as opened:
        verdicts = await submit(opened, *(write(task, completed()) for task in [*tasks, *slow]))
    assert set(verdicts) == {Verdict.WRITTEN}
    assert await db.statuses() == {"completed": 54}


@pytest.mark.parametrize("code", ["40P01", "40001"])
async def test_conflicts_are_tried_again(keeper: StatusRecorder, db: Database, code: str) -> None:
    tasks = await insert_many(db, 20)
    victim = await db.insert_task(QUEUE, {"fail": code, "times": 3})
    await db.execute(SPY)
    verdicts = await submit(keeper, *(write(task, completed()) for task in [*tasks, victim]))
    assert set(verdicts) == {Verdict.WRITTEN}
    assert await db.statuses() == {"completed": 21}


async def test_a_real_deadlock_is_tried_again(db: Database) -> None:
    first = await db.insert_task(QUEUE, {"hold": 1.5, "times": 1}, task_id="first")
    second = await db.insert_task(QUEUE, task_id="second")
    await db.execute(SPY)
    url = with_settings(db.url, deadlock_timeout="10ms", lock_timeout="10s")
    async with recording(url) as opened, await Connection.connect(db.url) as other:
        await other.execute("SELECT * FROM tasks WHERE id = 'second' FOR UPDATE")
        writes = [opened.submit(write(task, completed())) for task in (first, second)]

        async def asleep() -> list[Any]:
            return await db.fetch("SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep'")

        await until(asleep)
        # It has the first row and will want the second; whichever is the victim, nothing is lost.
        await other.execute("SELECT * FROM tasks WHERE id = 'first' FOR UPDATE")
        await other.rollback()
        assert await settled(*writes) == [Verdict.WRITTEN, Verdict.WRITTEN]
    assert await db.statuses() == {"completed": 2}


async def test_a_serialization_failure_is_tried_again(db: Database) -> None:
    tasks = await insert_many(db, 5)
    url = with_settings(db.url, default_transaction_isolation=r"repeatable\ read")
    async with recording(url) as opened, await Connection.connect(db.url) as other:
        await other.execute("UPDATE tasks SET updated_at = now() WHERE id = 'task-2'")
        writes = [opened.submit(write(task, completed())) for task in tasks]

        async def waiting() -> list[Any]:
            return await db.fetch("SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'")

        await until(waiting)
        await other.commit()
        assert set(await settled(*writes)) == {Verdict.WRITTEN}
    assert await db.statuses() == {"completed": 5}


@pytest.mark.parametrize("code", ["P0001", "42501", "XX000"])
async def test_a_row_that_is_refused_for_an_odd_reason_does_not_hold_up_the_others(
    keeper: StatusRecorder, db: Database, code: str
) -> None:
    tasks = await insert_many(db, 20)
    victim = await db.insert_task(QUEUE, {"fail": code, "times": 1_000_000})
    await db.execute(SPY)
    held = keeper.submit(write(victim, completed()))
    for patch in (active(), completed()):
        verdicts = await submit(keeper, *(write(task, patch) for task in tasks))
        assert set(verdicts) == {Verdict.WRITTEN}
    assert not held.settled.done()
    await db.execute("DROP TRIGGER spy ON tasks")
    assert await settled(held) == [Verdict.WRITTEN]


async def test_connections_that_are_ended_are_replaced(db: Database) -> None:
    tasks = await insert_many(db, 400)

    async def keep_writing(opened: StatusRecorder, task: str) -> None:
        for attempt in range(1, 11):
            assert await submit(opened, write(task, active(attempt))) == [Verdict.WRITTEN]
        assert await submit(opened, write(task, completed())) == [Verdict.WRITTEN]

    async def end_connections() -> None:
        for _ in range(8):
            await db.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            await asyncio.sleep(0.05)

    async with recording(db.url, connections=3) as opened:
        await asyncio.gather(end_connections(), *(keep_writing(opened, task) for task in tasks))
    assert await db.statuses() == {"completed": 400}
    assert await db.fetch("SELECT DISTINCT data->>'attempts' FROM tasks") == [("10",)]
