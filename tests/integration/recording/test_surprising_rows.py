"""Rows that surprise: what the API, or anybody, does to a row while its job waits or runs.

The recorder's own tests have the single writes; here whole jobs run.
"""

from functools import partial
from pathlib import Path

import pytest
from psycopg.types.json import Jsonb
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import define_task
from tests.support.api import Api
from tests.support.api_writes import (
    HOUR_MS,
    IMPATIENT,
    NEVER_ENDS,
    QUEUE,
    RETRIES,
    Ending,
    Handler,
    Retry,
    check_the_next_runs,
    merge,
    raises,
    returns,
    until_state,
)
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.until import until

ROOT = Path(__file__).parents[3]

# -- the API's retry -----------------------------------------------------------------------------


@pytest.mark.parametrize("retry", RETRIES)
@pytest.mark.parametrize(("first", "status"), [(raises, "failed"), (returns, "completed")])
async def test_a_finished_task_that_the_api_retries_runs_again(
    run_worker: RunWorker, api: Api, retry: Retry, first: Ending, status: str
) -> None:
    handler, attempt = Handler(first, raises, returns), RETRIES[retry]
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([handler.task()]):
        started = (await api.until_both_say(QUEUE, task_id, status))["startedAt"]
        await retry(api, task_id)
        await until(lambda: len(handler.ran[task_id]) == 2)
        row = await api.until_both_say(QUEUE, task_id, "failed")
        assert row["startedAt"] > started
        assert (row["attempts"], row["error"]["reason"]) == (attempt, f"attempt {attempt}")
        await retry(api, task_id)
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert len(handler.ran[task_id]) == 3
    assert (row["error"], row["failedAt"]) == (None, None)
    assert row["result"]["output"] == row["attempts"] == handler.ran[task_id][-1]


# -- missing, deleted, foreign -------------------------------------------------------------------


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_row_that_comes_after_the_first_attempt(
    run_worker: RunWorker, api: Api, recorded: bool
) -> None:
    handler = Handler(raises, returns)
    task_id = await api.node.schedule(QUEUE, attempts=2, backoff=HOUR_MS, task_id="not-of-the-api")
    async with run_worker([handler.task()], record_unknown_jobs=recorded):
        await until_state(api, task_id, "delayed")
        assert await api.db.status(task_id) == ("delayed" if recorded else None)
        if not recorded:
            await api.db.insert_task(QUEUE, task_id=task_id, maxAttempts=2)
        await api.node.job(QUEUE, task_id, "promote")
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert (row["attempts"], row["result"]["output"]) == (2, 2)


@pytest.mark.parametrize(("ending", "state"), [(returns, "completed"), (raises, "failed")])
async def test_a_row_deleted_while_its_job_runs_stays_deleted(
    run_worker: RunWorker, api: Api, ending: Ending, state: str
) -> None:
    handler = Handler(ending, opened=False)
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([handler.task()]):
        await api.until_both_say(QUEUE, task_id, "active")
        await api.db.execute("DELETE FROM tasks")
        handler.gate.set()
        await until_state(api, task_id, state)
        await check_the_next_runs(api, handler)
    assert await api.db.row(task_id) is None


@pytest.mark.parametrize("whose", ["the API's", "another producer's"])
async def test_a_row_deleted_between_two_attempts_stays_deleted(
    run_worker: RunWorker, api: Api, whose: str
) -> None:
    handler = Handler(raises, returns, opened=False)
    if whose == "the API's":
        task_id = await api.schedule(QUEUE, {"n": 1}, attempts=2, backoff=10)
    else:
        task_id = await api.node.add(QUEUE, {"n": 1}, jobId="theirs", attempts=2, backoff=10)
    async with run_worker([handler.task()]):
        await api.until_both_say(QUEUE, task_id, "active")
        await api.db.execute("DELETE FROM tasks")
        handler.gate.set()
        await until_state(api, task_id, "completed")
    assert handler.ran[task_id] == [1, 2]
    assert await api.db.rows() == {}


@pytest.mark.parametrize("ending", [returns, raises])
async def test_a_row_deleted_before_its_job_starts_stays_deleted(
    run_worker: RunWorker, api: Api, ending: Ending
) -> None:
    handler = Handler(ending)
    task_id = await api.schedule(QUEUE, {"n": 1}, attempts=2, backoff=10)
    other = await api.schedule(QUEUE, {"n": 2}, attempts=1)
    await api.db.execute("DELETE FROM tasks WHERE id = %s", task_id)
    with capture_logs() as logs:
        async with run_worker([handler.task()]):
            await until_state(api, task_id, "completed" if ending is returns else "failed")
            await until_state(api, other, "completed" if ending is returns else "failed")
    assert handler.ran[task_id] == ([1] if ending is returns else [1, 2])
    assert (await api.db.rows()).keys() == {other}
    said = [entry["task_id"] for entry in logs if entry["event"] == "job_without_row"]
    assert said == [task_id] * len(handler.ran[task_id])


async def test_a_row_deleted_while_its_worker_dies_stays_deleted(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter
) -> None:
    task_id = await api.schedule(QUEUE)
    worker = worker_process(NEVER_ENDS)
    await api.until_both_say(QUEUE, task_id, "active")
    await api.db.execute("DELETE FROM tasks")
    worker.kill()
    handler = Handler()
    task = handler.task()
    async with run_worker([define_task(QUEUE, handler, task.options, worker_options=IMPATIENT)]):
        await until_state(api, task_id, "completed")
    assert await api.db.rows() == {}


@pytest.mark.foreign_rows
@pytest.mark.parametrize("data", [[], "text", 5, True, None])
async def test_a_row_whose_data_is_no_object_is_left_alone(
    run_worker: RunWorker, api: Api, data: object
) -> None:
    handler = Handler()
    task_id = await api.schedule(QUEUE)
    await api.db.execute("UPDATE tasks SET data = %s", Jsonb(data))
    with capture_logs() as logs:
        async with run_worker([handler.task()]):
            await until_state(api, task_id, "completed")
    assert handler.ran == {task_id: [1]}
    assert await api.db.fetch("SELECT data FROM tasks") == [(data,)]
    assert "row_is_not_an_object" in {entry["event"] for entry in logs}


@pytest.mark.parametrize("levels", [900, 990, 1000, 1010, 1022])
async def test_a_new_row_for_options_nested_too_deeply_for_python(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str, levels: int
) -> None:
    handler = Handler()
    task_id = await api.node.add(QUEUE, {"n": 1}, jobId="deep", priority=2)
    backoff = '{"type":' * levels + "1" + "}" * levels
    opts = f'{{"attempts":2,"jobId":"deep","backoff":{backoff}}}'
    await redis.hset(f"{prefix}:{QUEUE}:{task_id}", "opts", opts)
    async with run_worker([handler.task()]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
        await check_the_next_runs(api, handler)
    assert handler.ran[task_id] == [1]
    assert (row["payload"], row["maxAttempts"]) == ({"n": 1}, 2)


async def test_another_queues_row_is_left_alone(run_worker: RunWorker, api: Api) -> None:
    first, second = Handler(raises, returns), Handler()
    task_id = await api.schedule(QUEUE, {"n": 1}, attempts=1)
    ours = await api.node.schedule(
        "other", {"n": 2}, task_id=task_id, attempts=2, backoff=10, priority="low"
    )
    async with run_worker([second.task(), first.task("other")]):
        theirs = await api.until_both_say(QUEUE, task_id, "completed")
        row = await api.until_both_say("other", ours, "completed", row_id=f"other~{ours}")
    assert (theirs["queueName"], theirs["payload"], theirs["attempts"]) == (QUEUE, {"n": 1}, 1)
    assert (row["queueName"], row["payload"], row["attempts"]) == ("other", {"n": 2}, 2)
    assert (await api.db.rows()).keys() == {task_id, f"other~{ours}"}


async def test_a_job_that_is_gone_from_redis_has_its_outcome_told(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    handler = Handler(opened=False)
    task_id = await api.schedule(QUEUE)
    async with run_worker([handler.task()]):
        await api.until_both_say(QUEUE, task_id, "active")
        await api.node.queue(QUEUE, "obliterate", {"force": True})
        assert await redis.keys(f"{prefix}:{QUEUE}:{task_id}") == []
        handler.gate.set()
        row = await api.db.until_status(task_id, "completed")
        assert row.result is not None
        await check_the_next_runs(api, handler)


# -- work that is done again -----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["at once", "after a backoff", "handed back"])
async def test_a_row_shows_a_result_only_while_it_is_completed(
    run_worker: RunWorker, api: Api, worker_process: WorkerStarter, how: str
) -> None:
    """The first worker dies between its outcome and BullMQ's word of it, so the work is done again.

    A trigger keeps every row that was shown since.
    """
    backoff = 0 if how == "at once" else 10
    task_id = await api.schedule(QUEUE, {"n": 1}, attempts=2, backoff=backoff)
    first = worker_process(DIES_BEFORE_IT_TELLS, PYTHONPATH=str(ROOT))
    await first.wait()
    row = await api.db.task(task_id)
    assert row.status == "completed"
    assert row.result is not None
    await api.db.execute(SHOWN)
    handler = Handler(raises, raises, opened=how != "handed back")
    task = define_task(QUEUE, handler, worker_options=IMPATIENT)
    async with run_worker([task]) as worker:
        if how == "handed back":
            await until(lambda: task_id in handler.ran)
            assert await worker.abort() == 4
            assert await api.db.status(task_id) == "pending"
        else:
            await api.until_both_say(QUEUE, task_id, "failed")
    statuses = [
        status for (status,) in await api.db.fetch("SELECT status FROM shown ORDER BY number")
    ]
    expected = {"at once": "pending", "after a backoff": "delayed", "handed back": "pending"}
    assert statuses[:2] == ["active", expected[how]]
    assert await api.db.fetch(FALSE_ROWS) == []


DIES_BEFORE_IT_TELLS = f"""
    from autoflow_worker import define_task
    from chaos.crash_points import arm

    arm("after-commit")

    async def handle(payload, ctx):
        return "the result"

    tasks = [define_task("{QUEUE}", handle, worker_options={IMPATIENT})]
"""
SHOWN = """
CREATE TABLE shown (number serial, status text, data jsonb);
CREATE FUNCTION show() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO shown (status, data) VALUES (NEW.data->>'status', NEW.data);
  RETURN NEW;
END $$;
CREATE TRIGGER show BEFORE UPDATE ON tasks FOR EACH ROW EXECUTE FUNCTION show();
"""
FALSE_ROWS = """
SELECT data FROM shown WHERE
  status <> 'completed' AND (data->>'result' IS NOT NULL OR data->>'completedAt' IS NOT NULL)
  OR status <> 'failed' AND data->>'failedAt' IS NOT NULL
"""


# -- at the same moment --------------------------------------------------------------------------


async def test_keys_that_the_api_writes_at_the_same_moment_stay(
    run_worker: RunWorker, api: Api
) -> None:
    attempts = 25
    handler = Handler(*[raises] * (attempts - 1), returns)
    task_id = await api.schedule(QUEUE, attempts=attempts, opts={"backoff": 1})
    written = 0
    async with run_worker([handler.task()]):
        while await api.db.status(task_id) != "completed":
            written += 1
            await merge(api, task_id, userId=f"user-{written}", externalId=f"other-{written}")
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert handler.ran[task_id] == list(range(1, attempts + 1))
    assert (row["userId"], row["externalId"]) == (f"user-{written}", f"other-{written}")
    assert row["attempts"] == attempts


async def test_a_row_that_the_api_holds_is_written_when_it_lets_go(
    run_worker: RunWorker, api: Api
) -> None:
    handler = Handler(opened=False)
    task_id = await api.schedule(QUEUE)
    async with run_worker([handler.task(concurrency=2)]):
        await api.until_both_say(QUEUE, task_id, "active")
        async with api.db.connection.transaction():
            await merge(api, task_id, userId="the-user")
            handler.gate.set()
            other = await api.node.schedule(QUEUE)
            await until(partial(handler.ran.get, other))
            assert await api.node.get_state(QUEUE, task_id) == "active"
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["userId"] == "the-user"
