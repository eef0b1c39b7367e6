"""A task whose row says `cancelled`: before it runs, while it runs, between two attempts."""

import pytest

from tests.support.api import Api
from tests.support.api_writes import (
    HOUR_MS,
    QUEUE,
    Ending,
    Handler,
    cancel,
    check_the_next_runs,
    moves,
    raises,
    retry_by_adding,
    returns,
    until_state,
)
from tests.support.running import RunWorker


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
