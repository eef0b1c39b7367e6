"""What a write leaves of a row, and which rows it leaves alone."""

import json
from typing import Any

import pytest

from autoflow_worker.recording import patches
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict
from tests.support.database import Database, task_data
from tests.support.recording import (
    NOON,
    QUEUE,
    active,
    completed,
    failed,
    insert_many,
    new,
    recording,
    settled,
    submit,
    with_settings,
    write,
)


async def test_a_patch_is_merged_and_other_keys_stay(keeper: StatusRecorder, db: Database) -> None:
    task = await db.insert_task(QUEUE, {"a": [1]}, userId="u-1", externalId="e-1", priority="high")
    before = await db.row(task) or {}
    patch = completed({"sent": True})
    assert await submit(keeper, write(task, patch)) == [Verdict.WRITTEN]
    assert await db.row(task) == before | patch


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/St_Johns", "UTC"])
async def test_times_are_utc_whatever_the_time_zone(db: Database, zone: str) -> None:
    task = await db.insert_task(QUEUE)
    new_row = task_data(QUEUE, {})
    async with recording(with_settings(db.url, TimeZone=zone)) as opened:
        await submit(
            opened, write(task, active()), write("a-new-one", active(), new_row=new(new_row))
        )
    times = await db.fetch(
        "SELECT timezone('utc', now()) - updated_at FROM tasks"
        " UNION ALL SELECT timezone('utc', now()) - created_at FROM tasks WHERE id = 'a-new-one'"
    )
    assert len(times) == 3
    assert all(0 <= since.total_seconds() < 600 for (since,) in times)


@pytest.mark.parametrize(
    ("shown", "guard", "verdict"),
    [
        (None, {"since": patches.iso(NOON)}, Verdict.WRITTEN),
        (patches.iso(NOON - 1), {"since": patches.iso(NOON)}, Verdict.WRITTEN),
        (patches.iso(NOON), {"since": patches.iso(NOON)}, Verdict.WRITTEN),
        (patches.iso(NOON + 1), {"since": patches.iso(NOON)}, Verdict.CONTESTED),
        ("2026-01-02T12:00:00Z", {"since": patches.iso(NOON + 5)}, Verdict.CONTESTED),
        (patches.iso(NOON), {"fence": patches.iso(NOON)}, Verdict.WRITTEN),
        (patches.iso(NOON - 1), {"fence": patches.iso(NOON)}, Verdict.CONTESTED),
        (patches.iso(NOON + 1), {"fence": patches.iso(NOON)}, Verdict.CONTESTED),
        (None, {"fence": patches.iso(NOON)}, Verdict.CONTESTED),
        (patches.iso(NOON + 1), {}, Verdict.WRITTEN),
    ],
)
@pytest.mark.foreign_rows
async def test_a_write_goes_only_into_the_row_of_its_own_attempt(
    keeper: StatusRecorder,
    db: Database,
    shown: str | None,
    guard: dict[str, str],
    verdict: Verdict,
) -> None:
    task = await db.insert_task(QUEUE, startedAt=shown, status="active")
    before = await db.row(task) or {}
    patch = active(2) if "since" in guard else failed()
    assert await submit(keeper, write(task, patch, **guard)) == [verdict]
    expected = before | patch if verdict is Verdict.WRITTEN else before
    assert await db.row(task) == expected


@pytest.mark.parametrize(
    ("patch", "verdict", "status"),
    [
        (active(), Verdict.CANCELLED, "cancelled"),
        (failed(), Verdict.CANCELLED, "cancelled"),
        (patches.handed_back_patch(), Verdict.CANCELLED, "cancelled"),
        # The work was done after all.
        (completed(), Verdict.WRITTEN, "completed"),
    ],
)
async def test_a_cancelled_row_stays_cancelled(
    keeper: StatusRecorder, db: Database, patch: dict[str, Any], verdict: Verdict, status: str
) -> None:
    task = await db.insert_task(QUEUE, status="cancelled")
    assert await submit(keeper, write(task, patch)) == [verdict]
    assert await db.status(task) == status


async def test_another_queues_row_is_left_alone(keeper: StatusRecorder, db: Database) -> None:
    task = await db.insert_task("another-queue", {"theirs": True})
    theirs = await db.row(task)
    new_row = new(task_data(QUEUE, {"ours": True}))
    verdicts = await submit(keeper, write(task, active(), new_row=new_row))
    assert verdicts == await submit(keeper, write(task, completed())) == [Verdict.FOREIGN]
    assert await db.rows() == {task: theirs}


@pytest.mark.foreign_rows
@pytest.mark.parametrize("data", ["null", "[]", '"text"', "1", '[{"status": "pending"}]'])
async def test_a_row_that_is_not_an_object_is_left_alone(
    keeper: StatusRecorder, db: Database, data: str
) -> None:
    other = await db.insert_task(QUEUE)
    await db.execute("INSERT INTO tasks (id, data) VALUES ('odd', %s)", data)
    new_row = new(task_data(QUEUE, {}))
    verdicts = await submit(keeper, write("odd", active(), new_row=new_row), write(other, active()))
    assert verdicts == [Verdict.UNUSABLE, Verdict.WRITTEN]
    assert await db.fetch("SELECT data FROM tasks WHERE id = 'odd'") == [(json.loads(data),)]


async def test_a_row_without_a_queue_is_ours(keeper: StatusRecorder, db: Database) -> None:
    task = await db.insert_task(QUEUE)
    await db.execute("UPDATE tasks SET data = data - 'queueName'")
    assert await submit(keeper, write(task, active())) == [Verdict.WRITTEN]
    await db.execute(
        "UPDATE tasks SET data = data || jsonb_build_object('queueName', %s::text)", QUEUE
    )


async def test_a_missing_row_is_made_where_one_is_wanted(
    keeper: StatusRecorder, db: Database
) -> None:
    wanted = task_data(QUEUE, {"a": 1})
    there = await db.insert_task(QUEUE)
    verdicts = await submit(
        keeper,
        write("unwanted", active()),
        write("wanted", active(), new_row=new(wanted)),
        write(there, active(), new_row=new(wanted)),
    )
    assert verdicts == [Verdict.MISSING, Verdict.WRITTEN, Verdict.WRITTEN]
    rows = await db.rows()
    assert rows.keys() == {"wanted", there}
    assert rows["wanted"] == wanted | active()
    assert rows[there]["payload"] == {}


async def test_a_row_deleted_meanwhile_is_not_made_again(
    keeper: StatusRecorder, db: Database
) -> None:
    task = await db.insert_task(QUEUE)
    await submit(keeper, write(task, active()))
    await db.execute("DELETE FROM tasks")
    assert await submit(keeper, write(task, completed())) == [Verdict.MISSING]
    assert await db.rows() == {}


async def test_a_trigger_that_swallows_writes_does_not_hold_up_others(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 10)
    await db.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER swallow BEFORE UPDATE ON tasks FOR EACH ROW"
        " WHEN (OLD.id = 'task-3') EXECUTE FUNCTION swallow()"
    )
    writes = [keeper.submit(write(task, active())) for task in tasks]
    await settled(*(w for w in writes if w.row_id != "task-3"))
    assert await submit(keeper, write(tasks[0], completed())) == [Verdict.WRITTEN]
    assert not writes[3].settled.done()
    await db.execute("DROP TRIGGER swallow ON tasks")
    assert await settled(writes[3]) == [Verdict.WRITTEN]
