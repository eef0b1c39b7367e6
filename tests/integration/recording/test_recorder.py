"""The recorder against a real PostgreSQL: group commit, its guards, and what it survives."""

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import orjson
import psycopg
import pytest
from structlog.testing import capture_logs

from autoflow_worker.recording import lane, patches, recorder
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.statements import (
    UPDATE_MANY,
    UPDATE_MANY_RELAXED,
    UPDATE_ONE,
    UPDATE_ONE_RELAXED,
)
from autoflow_worker.recording.write import NewRow, Verdict, Write
from tests.support.database import Connection, Database, task_data
from tests.support.postgres_proxy import PostgresProxy
from tests.support.until import until

QUEUE = "a-queue"
NOON = 1_767_355_200_000  # 2026-01-02T12:00:00Z

# What was written, in order, by which transaction, and how durable that was. `hold` and `fail` make
# one row's update take its time, or fail so many times; a sequence is not rolled back.
SPY = """
CREATE SEQUENCE failures;
CREATE TABLE written (
  number serial, id text, status text, durable text, transaction bigint DEFAULT txid_current());
CREATE FUNCTION spy() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
  orders jsonb := OLD.data->'payload';
BEGIN
  IF orders ? 'hold' AND nextval('failures') <= (orders->>'times')::int THEN
    PERFORM pg_sleep((orders->>'hold')::float);
  END IF;
  IF orders ? 'fail' AND nextval('failures') <= (orders->>'times')::int THEN
    RAISE EXCEPTION 'as ordered' USING ERRCODE = orders->>'fail';
  END IF;
  INSERT INTO written (id, status, durable)
  VALUES (NEW.id, NEW.data->>'status', current_setting('synchronous_commit'));
  RETURN NEW;
END $$;
CREATE TRIGGER spy BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION spy();
"""


def active(attempt: int = 1, at: int = NOON) -> dict[str, Any]:
    return patches.active_patch(now_ms=at, attempt=attempt)


def completed(output: object = None) -> dict[str, Any]:
    result = patches.success_result(output, duration_ms=7)
    return patches.completed_patch(now_ms=NOON, result=result)


def failed(reason: str = "no reason") -> dict[str, Any]:
    error = patches.error_record(reason, now_ms=NOON)
    return patches.failed_patch(now_ms=NOON, attempt=1, error=error)


def write(row_id: str, patch: Mapping[str, Any], text: str | None = None, **guards: Any) -> Write:
    queue = guards.pop("queue", QUEUE)
    return Write(row_id, queue, patch, text or patches.encode(dict(patch)), **guards)


def new(row: Mapping[str, Any]) -> NewRow:
    return NewRow(patches.encode(dict(row)), patches.encode({**row, "payload": {}}))


@asynccontextmanager
async def recording(url: str, connections: int = 1) -> AsyncIterator[StatusRecorder]:
    opened = StatusRecorder(url, max_connections=connections)
    await opened.open(10)
    try:
        yield opened
    finally:
        await opened.close(60)


@pytest.fixture
async def keeper(db: Database) -> AsyncIterator[StatusRecorder]:
    """A recorder with one connection on the test's database."""
    async with recording(db.url) as opened:
        yield opened


async def settled(*writes: Write) -> list[Verdict]:
    async with asyncio.timeout(150):
        await asyncio.gather(*(write.ready for write in writes))
        return list(await asyncio.gather(*(write.settled for write in writes)))


async def submit(opened: StatusRecorder, *writes: Write) -> list[Verdict]:
    return await settled(*(opened.submit(write) for write in writes))


async def spied(db: Database, what: str) -> list[Any]:
    return [row[0] for row in await db.fetch(f"SELECT {what} FROM written ORDER BY number")]


async def transactions(db: Database) -> int:
    """How many statements wrote rows."""
    return len(set(await spied(db, "transaction")))


def with_settings(url: str, **settings: str) -> str:
    """A URL whose sessions have these settings of PostgreSQL."""
    options = " ".join(f"-c {name}={value}" for name, value in settings.items())
    return f"{url}?options={quote(options)}"


def ids(count: int) -> list[str]:
    return [f"task-{number}" for number in range(count)]


async def insert_slow(db: Database) -> str:
    """A row whose first update takes half a second."""
    return await db.insert_task(QUEUE, {"hold": 0.5, "times": 1})


async def insert_many(db: Database, count: int) -> list[str]:
    await db.insert_tasks(QUEUE, {task_id: {} for task_id in ids(count)})
    return ids(count)


# -- group commit --------------------------------------------------------------------------------


async def test_what_comes_while_a_statement_runs_is_the_next_statement(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 300)
    slow = await insert_slow(db)
    await db.execute(SPY)
    first = keeper.submit(write(slow, active()))
    await until(lambda: keeper._lanes[0].batch)
    verdicts = await submit(keeper, *(write(task_id, active()) for task_id in tasks))
    assert {*verdicts, await first.settled} == {Verdict.WRITTEN}
    assert await transactions(db) == 2
    assert await db.statuses() == {"active": 301}


async def test_alone_each_write_is_a_statement_of_its_own(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 20)
    await db.execute(SPY)
    for task_id in tasks:
        await submit(keeper, write(task_id, active()))
        assert await db.status(task_id) == "active"
    assert await transactions(db) == 20


async def test_a_caller_goes_on_when_its_own_batch_is_committed(
    keeper: StatusRecorder, db: Database
) -> None:
    early = await db.insert_task(QUEUE)
    late = await insert_slow(db)
    await db.execute(SPY)
    first = keeper.submit(write(early, completed()))
    await until(lambda: not keeper._waiting)
    second = keeper.submit(write(late, completed()))
    assert await settled(first) == [Verdict.WRITTEN]
    assert await db.status(early) == "completed"
    assert not second.settled.done()
    assert await settled(second) == [Verdict.WRITTEN]
    assert await db.status(late) == "completed"


async def test_writes_of_one_row_keep_their_order(keeper: StatusRecorder, db: Database) -> None:
    tasks = await insert_many(db, 50)
    slow = await insert_slow(db)
    await db.execute(SPY)
    keeper.submit(write(slow, active()))
    await until(lambda: keeper._lanes[0].batch)
    all_four = [active(), patches.handed_back_patch(), active(2, NOON + 1), completed()]
    verdicts = await submit(keeper, *(write(task, patch) for patch in all_four for task in tasks))
    assert set(verdicts) == {Verdict.WRITTEN}
    for task in tasks:
        rows = await db.fetch("SELECT status FROM written WHERE id = %s ORDER BY number", task)
        assert [status for (status,) in rows] == ["active", "pending", "active", "completed"]
    assert await transactions(db) == 1 + len(all_four)


async def test_further_connections_take_what_one_statement_can_not_hold(db: Database) -> None:
    tasks = await insert_many(db, 3 * lane.MAX_BATCH)
    await db.execute(SPY)
    async with recording(db.url, connections=3) as several:
        verdicts = await submit(
            several,
            *(write(task, active()) for task in tasks),
            *(write(task, completed()) for task in tasks),
        )
    assert set(verdicts) == {Verdict.WRITTEN}
    assert await db.statuses() == {"completed": len(tasks)}
    backends = await db.fetch(
        "SELECT count(*) FROM (SELECT id FROM written GROUP BY id"
        " HAVING array_agg(status ORDER BY number) = '{active,completed}') AS in_order"
    )
    assert backends == [(len(tasks),)]


async def test_large_patches_do_not_pile_up_in_one_statement(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 40)
    await db.execute(SPY)
    text = "x" * (recorder.MAX_BATCH_SIZE // 10)
    verdicts = await submit(keeper, *(write(task, completed(text)) for task in tasks))
    assert set(verdicts) == {Verdict.WRITTEN}
    assert await transactions(db) >= 4


async def test_only_batches_of_starts_do_not_wait_for_the_disk(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 4)
    await db.execute(SPY)
    await submit(keeper, *(write(task, active()) for task in tasks[:3]))
    await submit(keeper, write(tasks[0], completed()), write(tasks[3], active()))
    await submit(keeper, write(tasks[1], failed()))
    await submit(keeper, write(tasks[2], active(2)))
    assert await spied(db, "durable") == ["off"] * 3 + ["on"] * 3 + ["off"]


# -- the row -------------------------------------------------------------------------------------


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


# -- what PostgreSQL will never take ---------------------------------------------------------------

BAD_TEXTS = {
    "nul": r'"\u0000"',
    "escaped surrogate": r'"\ud800"',
    "python surrogate": '"\ud800"',
    "huge number": "1e400000",
    "no JSON": '"unfinished',
    "too deep": "[" * 50_000 + "]" * 50_000,
}


@pytest.mark.parametrize("kind", BAD_TEXTS)
async def test_one_bad_patch_among_many_is_found(
    keeper: StatusRecorder, db: Database, kind: str
) -> None:
    tasks = await insert_many(db, 200)
    await db.execute(SPY)
    writes = [write(task, completed(number)) for number, task in enumerate(tasks)]
    bad = writes[77]
    bad.text = bad.text.replace('"output":77', f'"output":{BAD_TEXTS[kind]}')
    assert set(await submit(keeper, *writes)) == {Verdict.WRITTEN}
    rows = await db.rows()
    # The bad row gets what still is true of it.
    assert rows["task-77"]["status"] == "completed"
    assert rows["task-77"]["result"] == {"success": True, "duration": 7}
    outputs = {number: rows[task]["result"].get("output") for number, task in enumerate(tasks)}
    assert outputs == {number: number if number != 77 else None for number in range(200)}
    # Each was written once, and the bad one was found by halving.
    assert len(await spied(db, "id")) == 200
    assert await transactions(db) <= 12


async def test_a_reason_that_can_not_be_stored_is_replaced(
    keeper: StatusRecorder, db: Database
) -> None:
    task = await db.insert_task(QUEUE)
    bad = write(task, failed("bad"))
    bad.text = bad.text.replace('"bad"', r'"\u0000"')
    assert await submit(keeper, bad) == [Verdict.WRITTEN]
    row = await db.task(task)
    assert row.status == "failed"
    assert row.error is not None
    assert "can't be stored" in row.error.reason


@pytest.mark.parametrize("row_id", ["nul\0", "surrogate\udc80", "\ud800"])
async def test_an_id_that_can_not_be_stored_costs_its_own_history(
    keeper: StatusRecorder, db: Database, row_id: str
) -> None:
    tasks = await insert_many(db, 20)
    bad = write(row_id, completed(), new_row=new(task_data(QUEUE, {})))
    others = [write(task, completed()) for task in tasks]
    for each in (*others, bad):
        keeper.submit(each)
    assert await settled(*others) == [Verdict.WRITTEN] * 20
    assert await bad.ready is Verdict.PUT_OFF
    await until(lambda: bad.times_put_off >= 2)
    assert await submit(keeper, write(tasks[0], failed())) == [Verdict.WRITTEN]
    keeper.withdraw(bad)
    assert await bad.settled is Verdict.WITHDRAWN


async def test_a_new_row_that_can_not_be_stored_costs_its_own_history(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 20)
    await db.execute(SPY)
    # No index takes so long a name.
    bad_row = new(task_data(secrets.token_hex(4000), {}))
    good_row = task_data(QUEUE, {"good": 1})
    writes = [write(task, active()) for task in tasks]
    bad = keeper.submit(write("new-bad", active(), new_row=bad_row))
    writes.append(write("new-good", active(), new_row=new(good_row)))
    assert await submit(keeper, *writes) == [Verdict.WRITTEN] * 21
    await until(lambda: bad.is_put_off)
    rows = await db.rows()
    assert rows.keys() == {*tasks, "new-good"}
    assert rows["new-good"] == good_row | active()
    # What was written before the bad row showed is not written again.
    assert sorted(await spied(db, "id")) == sorted([*tasks, "new-good"])
    keeper.withdraw(bad)


# -- what PostgreSQL refuses -----------------------------------------------------------------------

CHECKED = "ALTER TABLE tasks ADD CONSTRAINT checked CHECK (NOT data->'payload' ? 'bad') NOT VALID"
UNCHECKED = "ALTER TABLE tasks DROP CONSTRAINT checked"


async def test_a_row_that_is_refused_is_written_whole_when_it_is_taken(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 50)
    bad = await db.insert_task(QUEUE, {"bad": True})
    await db.execute(CHECKED)
    held = keeper.submit(write(bad, completed("the whole result")))
    assert set(await submit(keeper, *(write(task, completed()) for task in tasks))) == {
        Verdict.WRITTEN
    }
    assert await held.ready is Verdict.PUT_OFF
    await until(lambda: held.times_put_off >= 2)
    assert not held.settled.done()
    later = keeper.submit(write(bad, failed()))
    await db.execute(UNCHECKED)
    assert await settled(held, later) == [Verdict.WRITTEN, Verdict.WRITTEN]
    row = await db.row(bad)
    assert row is not None
    assert row["status"] == "failed"


async def test_what_is_refused_is_put_off_with_its_result_even_if_it_can_not_be_stored(
    keeper: StatusRecorder, db: Database
) -> None:
    """The smallest patch is refused as well, and what comes after that is the whole one."""
    bad = await db.insert_task(QUEUE, {"bad": True})
    await db.execute(
        "CREATE FUNCTION measure() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM 1 / (NEW.data->'result' = '0')::int; RETURN NEW; END $$;"
        "CREATE TRIGGER measure BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION measure()"
    )
    held = keeper.submit(write(bad, completed("the whole result")))
    await until(lambda: held.times_put_off >= 2)
    await db.execute("DROP TRIGGER measure ON tasks")
    assert await settled(held) == [Verdict.WRITTEN]
    row = await db.task(bad)
    assert row.result is not None
    assert row.result.output == "the whole result"


async def test_a_refused_start_is_late_and_no_sooner(
    keeper: StatusRecorder, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "START_PATIENCE", 1.0)
    bad = await db.insert_task(QUEUE, {"bad": True})
    await db.execute(CHECKED)
    start = keeper.submit(write(bad, active()))
    await until(lambda: start.times_put_off)
    assert not start.ready.done()
    assert await start.ready is Verdict.LATE
    await db.execute(UNCHECKED)
    assert await settled(start) == [Verdict.WRITTEN]


async def test_three_refused_rows_beside_one_that_a_trigger_leaves(
    keeper: StatusRecorder, db: Database
) -> None:
    slow = await insert_slow(db)
    left = await db.insert_task(QUEUE, task_id="left")
    await db.execute(SPY)
    await db.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER swallow BEFORE UPDATE ON tasks FOR EACH ROW"
        " WHEN (OLD.id = 'left') EXECUTE FUNCTION swallow()"
    )
    await db.execute(CHECKED)
    keeper.submit(write(slow, active()))
    await until(lambda: keeper._lanes[0].batch)
    # These are one batch.
    row = new(task_data(QUEUE, {"bad": True}))
    refused = [keeper.submit(write(f"new-{n}", active(), new_row=row)) for n in range(3)]
    held = keeper.submit(write(left, active()))
    await until(lambda: all(w.times_put_off >= 2 for w in (*refused, held)))
    await db.execute(UNCHECKED)
    await db.execute("DROP TRIGGER swallow ON tasks")
    assert await settled(*refused, held) == [Verdict.WRITTEN] * 4


async def test_a_new_row_that_a_trigger_swallows_is_refused(
    keeper: StatusRecorder, db: Database
) -> None:
    await db.execute(
        "CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';"
        "CREATE TRIGGER swallow BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION swallow()"
    )
    held = keeper.submit(write("new", completed(), new_row=new(task_data(QUEUE, {}))))
    assert await held.ready is Verdict.PUT_OFF
    await db.execute("DROP TRIGGER swallow ON tasks")
    assert await settled(held) == [Verdict.WRITTEN]
    assert await db.status("new") == "completed"


class Hostile(Write):
    """A write that this package's own code breaks on."""

    __slots__ = ()

    def as_json(self) -> dict[str, Any]:
        raise RecursionError("as ordered")

    def as_parameters(self) -> list[bytes | None]:
        raise RecursionError("as ordered")


async def test_a_write_that_breaks_a_lane_costs_that_write(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 50)
    patch = completed()
    with capture_logs() as logs:
        bad = keeper.submit(Hostile("bad", QUEUE, patch, patches.encode(patch)))
        for patch in (active(), completed()):
            verdicts = await submit(keeper, *(write(task, patch) for task in tasks))
            assert set(verdicts) == {Verdict.WRITTEN}
        await until(lambda: bad.times_put_off >= 2)
    keeper.withdraw(bad)
    [refused] = [entry for entry in logs if entry["event"] == "row_refused"]
    assert (refused["row"], refused["reason"]) == ("bad", "RecursionError: as ordered")
    assert isinstance(refused["exc_info"], RecursionError)


# A row's first update is refused; the next one waits for an advisory lock, and may be refused too.
ONE_AT_A_TIME = """
CREATE SEQUENCE tries;
CREATE FUNCTION gate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.id = 'gated' THEN
    IF nextval('tries') <= 1 THEN RAISE 'the first time'; END IF;
    WHILE NOT pg_try_advisory_xact_lock(1) LOOP PERFORM pg_sleep(0.01); END LOOP;
    IF NEW.data->'payload' ? 'bad' THEN RAISE 'the second time'; END IF;
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER gate BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION gate();
"""


@pytest.mark.parametrize(
    ("payload", "verdict", "status"),
    [({}, Verdict.WRITTEN, "completed"), ({"bad": 1}, Verdict.WITHDRAWN, "failed")],
)
async def test_a_write_that_is_withdrawn_while_a_statement_holds_it(
    keeper: StatusRecorder, db: Database, payload: dict[str, Any], verdict: Verdict, status: str
) -> None:
    await db.insert_task(QUEUE, payload, task_id="gated")
    await db.execute(ONE_AT_A_TIME)
    await db.execute("SELECT pg_advisory_lock(1)")
    held = keeper.submit(write("gated", completed()))
    assert await held.ready is Verdict.PUT_OFF
    await until(lambda: held in keeper._lanes[0].batch)
    keeper.withdraw(held)
    # Nobody knows yet whether it will be written.
    assert not held.settled.done()
    await db.execute("SELECT pg_advisory_unlock(1)")
    assert await settled_after_that(held) is verdict
    await db.execute("DROP TRIGGER gate ON tasks")
    if verdict is Verdict.WITHDRAWN:
        assert await submit(keeper, write("gated", failed())) == [Verdict.WRITTEN]
    assert await db.status("gated") == status


async def test_a_write_that_is_withdrawn_while_it_waits_is_never_written(
    keeper: StatusRecorder, db: Database
) -> None:
    bad = await db.insert_task(QUEUE, {"bad": True})
    await db.execute(CHECKED)
    held = keeper.submit(write(bad, completed()))
    await until(lambda: held in keeper._postponed)
    keeper.withdraw(held)
    assert await settled_after_that(held) is Verdict.WITHDRAWN
    await db.execute(UNCHECKED)
    # Later writes of its row don't wait for it.
    assert await submit(keeper, write(bad, failed())) == [Verdict.WRITTEN]


async def settled_after_that(withdrawn: Write) -> Verdict:
    async with asyncio.timeout(30):
        return await withdrawn.settled


# -- locks, time limits and conflicts --------------------------------------------------------------


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
        await until(lambda: keeper._postponed)
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


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 50_000])
@pytest.mark.parametrize(
    ("statement", "count"),
    [(UPDATE_ONE, 1), (UPDATE_ONE_RELAXED, 1), (UPDATE_MANY, 500), (UPDATE_MANY_RELAXED, 500)],
)
async def test_rows_are_found_by_primary_key_whatever_the_tables_size(
    keeper: StatusRecorder, db: Database, size: int, statement: str, count: int
) -> None:
    await db.execute(
        "INSERT INTO tasks (id, data) SELECT 'row-' || n, %s FROM generate_series(1, %s::int) AS n",
        orjson.dumps(task_data(QUEUE, {})).decode(),
        size,
    )
    if size:
        await db.execute("ANALYZE tasks")
    writes = [write(f"row-{number}", completed()) for number in range(count)]
    many = [orjson.dumps([w.as_json() for w in writes])]
    link = await keeper._lanes[0].link()
    parameters = writes[0].as_parameters() if count == 1 else many
    explained = await link.execute("EXPLAIN " + statement, *parameters)
    plan = "\n".join(str(row[0]) for row in explained)
    assert "using tasks_pkey" in plan
    assert "Seq Scan" not in plan


# -- a server that hangs ---------------------------------------------------------------------------


async def test_giving_up_a_connection_that_hangs_asks_nobody(db: Database) -> None:
    """psycopg itself would connect once more, to have the statement cancelled, and wait for it."""
    async with PostgresProxy(db.url, lose=b"lock_timeout") as proxy:
        keeper = StatusRecorder(proxy.url)
        opening = asyncio.create_task(keeper.open(30))
        await proxy.lost.wait()
        opening.cancel()
        await asyncio.wait({opening})
        await keeper.close(1)
    assert proxy.accepted == 1


async def test_a_connection_that_ends_with_an_error_is_used_no_more(db: Database) -> None:
    """The error may be one that a single row is to blame for; the next statement must not be."""
    async with PostgresProxy(db.url, end_after=b"C22012") as proxy:  # division by zero
        keeper = StatusRecorder(proxy.url)
        await keeper.open(30)
        link = await keeper._lanes[0].link()
        with pytest.raises(psycopg.errors.DivisionByZero):
            await link.execute("SELECT 1 / 0")
        with pytest.raises(psycopg.OperationalError) as lost:
            await link.execute("SELECT 1")
        assert lost.value.sqlstate is None
        await keeper.close(1)
