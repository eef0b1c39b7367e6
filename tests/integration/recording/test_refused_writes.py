"""One write that PostgreSQL does not take costs no other write anything."""

import asyncio
import secrets
from typing import Any

import pytest
from structlog.testing import capture_logs

from autoflow_worker.recording import patches, recorder
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.write import Verdict, Write
from tests.support.database import Database, task_data
from tests.support.recording import (
    QUEUE,
    SPY,
    active,
    completed,
    failed,
    insert_many,
    insert_slow,
    new,
    settled,
    spied,
    submit,
    transactions,
    write,
)
from tests.support.until import until

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
    first = keeper.submit(write(slow, active()))
    await until(lambda: keeper.is_writing(first))
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
    await until(lambda: keeper.is_writing(held))
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
    await until(lambda: held.is_put_off)
    keeper.withdraw(held)
    assert await settled_after_that(held) is Verdict.WITHDRAWN
    await db.execute(UNCHECKED)
    # Later writes of its row don't wait for it.
    assert await submit(keeper, write(bad, failed())) == [Verdict.WRITTEN]


async def settled_after_that(withdrawn: Write) -> Verdict:
    async with asyncio.timeout(30):
        return await withdrawn.settled
