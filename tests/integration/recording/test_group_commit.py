"""What arrives while a statement runs goes into the next one."""

import orjson
import pytest

from autoflow_worker.recording import lane, patches, recorder
from autoflow_worker.recording.pool import Checkout
from autoflow_worker.recording.recorder import StatusRecorder
from autoflow_worker.recording.statements import (
    UPDATE_MANY,
    UPDATE_MANY_RELAXED,
    UPDATE_ONE,
    UPDATE_ONE_RELAXED,
)
from autoflow_worker.recording.write import Verdict
from tests.support.database import Database, task_data
from tests.support.recording import (
    NOON,
    QUEUE,
    SPY,
    active,
    completed,
    failed,
    insert_many,
    insert_slow,
    recording,
    settled,
    spied,
    submit,
    transactions,
    write,
)
from tests.support.until import until


async def test_what_comes_while_a_statement_runs_is_the_next_statement(
    keeper: StatusRecorder, db: Database
) -> None:
    tasks = await insert_many(db, 300)
    slow = await insert_slow(db)
    await db.execute(SPY)
    first = keeper.submit(write(slow, active()))
    await until(lambda: keeper.is_writing(first))
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
    await until(lambda: keeper.is_writing(first) or first.settled.done())
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
    first = keeper.submit(write(slow, active()))
    await until(lambda: keeper.is_writing(first))
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
    checkout = Checkout(keeper.pool, keeper.silence)
    link = await checkout.link()
    parameters = writes[0].as_parameters() if count == 1 else many
    explained = await link.execute("EXPLAIN " + statement, *parameters)
    await checkout.close()
    plan = "\n".join(str(row[0]) for row in explained)
    assert "using tasks_pkey" in plan
    assert "Seq Scan" not in plan
