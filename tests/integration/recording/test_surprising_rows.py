"""Rows that surprise: what the API, or anybody, does to a row while its job waits or runs.

tests/integration/test_recorder.py has the single writes; here whole jobs run.
"""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb
from redis.asyncio import Redis
from structlog.testing import capture_logs

from autoflow_worker import DelayedError, TaskContext, TaskDefinition, TaskOptions, define_task
from autoflow_worker.tasks.worker_options import WorkerOptions
from tests.support.api import Api, Json
from tests.support.database import task_data
from tests.support.node import Scheduled
from tests.support.process import WorkerStarter
from tests.support.running import RunWorker
from tests.support.until import until

QUEUE = "q"
ROOT = Path(__file__).parents[3]
HOUR_MS = 3_600_000
IMPATIENT: WorkerOptions = {"lockDuration": 1000, "stalledInterval": 1000}

NEVER_ENDS = f"""
    import asyncio
    from autoflow_worker import define_task

    async def handle(payload, ctx):
        await asyncio.Event().wait()

    tasks = [define_task("{QUEUE}", handle, worker_options={IMPATIENT})]
"""

Ending = Callable[[TaskContext], Awaitable[object]]
Retry = Callable[[Api, str], Awaitable[None]]


async def returns(ctx: TaskContext) -> object:
    return ctx.attempt


async def raises(ctx: TaskContext) -> object:
    raise ValueError(f"attempt {ctx.attempt}")


async def moves(ctx: TaskContext) -> object:
    """Delay the job by nothing, so that it comes again at once."""
    await ctx.job.moveToDelayed(0, ctx.job.token)
    raise DelayedError


class Handler:
    """A handler that waits for its gate and then ends as told.

    Attributes:
        ran: the attempts that were started, by job.
        ends: how they end; the last one goes for all that follow.
    """

    def __init__(self, *ends: Ending, opened: bool = True) -> None:
        self.ran: dict[str, list[int]] = {}
        self.ends = ends or (returns,)
        self.gate = asyncio.Event()
        if opened:
            self.gate.set()

    async def __call__(self, payload: Json, ctx: TaskContext) -> object:
        runs = self.ran.setdefault(ctx.task_id, [])
        runs.append(ctx.attempt)
        await self.gate.wait()
        return await self.ends[min(len(runs), len(self.ends)) - 1](ctx)

    def task(self, queue: str = QUEUE, **options: Any) -> TaskDefinition[Any]:
        return define_task(queue, self, TaskOptions(**options))


async def merge(api: Api, task_id: str, **keys: object) -> None:
    """What the API's own updates are: some keys of the row, merged."""
    patch = Jsonb(keys)
    changed = await api.db.execute(
        "UPDATE tasks SET data = data || %s WHERE id = %s", patch, task_id
    )
    assert changed == 1


async def cancel(api: Api, task_id: str) -> None:
    await merge(api, task_id, status="cancelled")


async def until_state(api: Api, task_id: str, state: str) -> None:
    async def reached() -> bool:
        return await api.node.get_state(QUEUE, task_id) == state

    await until(reached, message=f"{task_id} to be {state}")


async def check_the_next_runs(api: Api, handler: Handler) -> None:
    """The worker is none the worse for it."""
    task_id = await api.schedule(QUEUE)
    await until(lambda: task_id in handler.ran)
    assert (await api.node.get_counts(QUEUE))["waiting"] == 0


# -- cancelled -----------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, 100])
@pytest.mark.parametrize("way", ["the row only", "the job only", "both"])
async def test_a_task_cancelled_before_it_starts_never_runs(
    run_worker: RunWorker, api: Api, way: str, delay: int | None
) -> None:
    handler = Handler()
    task_id = await api.schedule(QUEUE, attempts=3, backoff=10, delay=delay)
    if way != "the row only":
        await api.node.job(QUEUE, task_id, "remove")
    if way != "the job only":
        await cancel(api, task_id)
    before = await api.db.row(task_id)
    async with run_worker([handler.task()]):
        if way == "the row only":
            await until_state(api, task_id, "failed")
            job = await api.node.get_job(QUEUE, task_id)
            assert job is not None
            assert (job["failedReason"], job["attemptsMade"]) == ("the task is cancelled", 1)
        await check_the_next_runs(api, handler)
    assert task_id not in handler.ran
    assert await api.db.row(task_id) == before


@pytest.mark.parametrize("way", ["the row only", "the job only", "both"])
async def test_a_task_cancelled_between_two_attempts_does_not_run_again(
    run_worker: RunWorker, api: Api, way: str
) -> None:
    handler = Handler(raises)
    task_id = await api.schedule(QUEUE, attempts=3, backoff=HOUR_MS)
    async with run_worker([handler.task()]):
        before = await api.until_both_say(QUEUE, task_id, "delayed")
        if way != "the job only":
            await cancel(api, task_id)
        if way == "the row only":
            await api.node.job(QUEUE, task_id, "promote")
            await until_state(api, task_id, "failed")
        else:
            await api.node.job(QUEUE, task_id, "remove")
        await check_the_next_runs(api, handler)
    assert handler.ran[task_id] == [1]
    status = "delayed" if way == "the job only" else "cancelled"
    assert await api.db.row(task_id) == before | {"status": status}


@pytest.mark.parametrize(
    ("ending", "status", "state"),
    [
        (returns, "completed", "completed"),  # The work was done, and that is what is told.
        (raises, "cancelled", "failed"),
        (moves, "cancelled", "failed"),
    ],
)
async def test_a_task_cancelled_while_it_runs(
    run_worker: RunWorker, api: Api, ending: Ending, status: str, state: str
) -> None:
    handler = Handler(ending, opened=False)
    task_id = await api.schedule(QUEUE, attempts=3, backoff=10)
    async with run_worker([handler.task()]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        await cancel(api, task_id)
        handler.gate.set()
        await until_state(api, task_id, state)
        await check_the_next_runs(api, handler)
    assert handler.ran[task_id] == [1]
    row = await api.db.row(task_id)
    assert row is not None
    assert row["status"] == status
    if status == "cancelled":
        assert row == before | {"status": "cancelled"}
    else:
        assert row["result"]["output"] == 1


async def test_a_task_cancelled_while_it_runs_and_handed_back_does_not_run_again(
    run_worker: RunWorker, api: Api
) -> None:
    handler = Handler(opened=False)
    task_id = await api.schedule(QUEUE)
    async with run_worker([handler.task()]) as worker:
        before = await api.until_both_say(QUEUE, task_id, "active")
        await cancel(api, task_id)
        assert await worker.abort() == 4
    assert await api.db.row(task_id) == before | {"status": "cancelled"}
    other = Handler()
    async with run_worker([other.task()]):
        await until_state(api, task_id, "failed")
    assert other.ran == {}
    assert await api.db.row(task_id) == before | {"status": "cancelled"}


async def test_a_cancelled_task_that_the_api_takes_up_again_runs(
    run_worker: RunWorker, api: Api
) -> None:
    handler = Handler()
    task_id = await api.schedule(QUEUE)
    await cancel(api, task_id)
    async with run_worker([handler.task()]):
        await until_state(api, task_id, "failed")
        await retry_by_adding(api, task_id)
        await api.until_both_say(QUEUE, task_id, "completed")
    assert handler.ran == {task_id: [1]}


# -- the API's retry -----------------------------------------------------------------------------


async def retry_by_adding(api: Api, task_id: str) -> None:
    """The row is pending again, and the job is added again under its id."""
    await merge(api, task_id, status="pending", attempts=0)
    if await api.node.get_job(QUEUE, task_id):
        await api.node.job(QUEUE, task_id, "remove")
    await api.node.schedule_all(QUEUE, [Scheduled({}, task_id=task_id, attempts=1)])


async def retry_by_adding_a_new_row(api: Api, task_id: str) -> None:
    """As the API would write a row for the first time."""
    data = task_data(QUEUE, {}, maxAttempts=1)
    await api.db.execute("UPDATE tasks SET data = %s WHERE id = %s", Jsonb(data), task_id)
    await api.node.job(QUEUE, task_id, "remove")
    await api.node.schedule_all(QUEUE, [Scheduled({}, task_id=task_id, attempts=1)])


async def retry_by_bullmq(api: Api, task_id: str) -> None:
    await merge(api, task_id, status="pending", attempts=0)
    state = await api.node.get_state(QUEUE, task_id)
    await api.node.job(QUEUE, task_id, "retry", state)


RETRIES: dict[Retry, int] = {retry_by_adding: 1, retry_by_adding_a_new_row: 1, retry_by_bullmq: 2}


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
