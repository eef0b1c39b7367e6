"""What each moment of an attempt writes: the contract's section 3.

A job's row is compared before and after, so that a test sees every key that was written.
"""

import pytest
from pydantic import BaseModel
from redis.asyncio import Redis

from autoflow_worker import TaskContext, UnrecoverableError, define_task
from tests.support.api import Api, Json
from tests.support.handlers import QUEUE, Gate, MustNotRun, hang, task
from tests.support.running import RunWorker
from tests.support.written import due, is_failure, is_now, patch

HOUR_MS = 3_600_000


async def test_picked_up(run_worker: RunWorker, api: Api) -> None:
    gate = Gate()
    task_id = await api.schedule(QUEUE)
    before = await api.db.row(task_id)
    async with run_worker([task(gate)]):
        written = patch(before, await api.until_both_say(QUEUE, task_id, "active"))
        assert is_now(written.pop("startedAt"))
        assert written == {"status": "active", "attempts": 1}
        gate.opened.set()
        await api.until_both_say(QUEUE, task_id, "completed")


async def test_the_row_is_active_when_the_handler_starts(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> str | None:
        return await api.db.status(ctx.task_id)

    task_id = await api.schedule(QUEUE)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["result"]["output"] == "active"


async def test_handler_returned(run_worker: RunWorker, api: Api) -> None:
    gate = Gate({"sent": True, "to": ["a@b.c", None, 1.5, {"ü": "\U0001f600"}]})
    task_id = await api.schedule(QUEUE, {"email": "a@b.c"})
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        written = patch(before, await api.until_both_say(QUEUE, task_id, "completed"))
    assert is_now(written.pop("completedAt"))
    assert type(written["result"].pop("duration")) is int
    assert written == {
        "status": "completed",
        "result": {"success": True, "output": gate.outcome},
    }


async def test_handler_returned_after_failing(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> int:
        if ctx.attempt < 3:
            raise ValueError(f"attempt {ctx.attempt} of {ctx.max_attempts}")
        return ctx.attempt

    task_id = await api.schedule(QUEUE, attempts=3, backoff=10)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "completed")
    assert row["attempts"] == 3
    assert row["result"]["output"] == 3
    assert (row["error"], row["failedAt"], row["delayUntil"]) == (None, None, None)


async def test_handler_raised_and_will_run_again_after_a_backoff(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    gate = Gate(ValueError("no such user"))
    task_id = await api.schedule(QUEUE, attempts=3, backoff=HOUR_MS)
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "delayed")
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert written.pop("delayUntil") == await due(redis, prefix, QUEUE, task_id)
    assert written == {"status": "delayed"}
    assert after["attempts"] == 1


async def test_handler_raised_and_will_run_again_at_once(run_worker: RunWorker, api: Api) -> None:
    gate, other = Gate(ValueError("no such user")), "more-urgent"

    async def handler(payload: Json, ctx: TaskContext) -> object:
        return await (hang if payload.get("hang") else gate)(payload, ctx)

    task_id = await api.schedule(QUEUE, attempts=2, backoff=0)
    async with run_worker([task(handler, concurrency=1)], worker_shutdown_grace=0.01) as worker:
        before = await api.until_both_say(QUEUE, task_id, "active")
        # The only slot takes this one next, so that the first job is seen waiting.
        await api.schedule(QUEUE, {"hang": True}, task_id=other, priority="critical")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "pending")
        assert await api.node.get_state(QUEUE, task_id) == "prioritized"
        await api.until_both_say(QUEUE, other, "active")
        await worker.stop()
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert written == {"status": "pending"}
    assert after["attempts"] == 1


async def test_handler_raised_and_no_attempt_is_left(run_worker: RunWorker, api: Api) -> None:
    gate = Gate(ValueError("no such user"))
    task_id = await api.schedule(QUEUE, attempts=1)
    async with run_worker([task(gate)]):
        before = await api.until_both_say(QUEUE, task_id, "active")
        gate.opened.set()
        after = await api.until_both_say(QUEUE, task_id, "failed")
    written = patch(before, after)
    assert is_failure(written.pop("error"), "no such user")
    assert is_now(written.pop("failedAt"))
    assert written == {"status": "failed"}
    assert after["attempts"] == 1


async def test_handler_raised_on_every_attempt(run_worker: RunWorker, api: Api) -> None:
    async def handler(payload: Json, ctx: TaskContext) -> None:
        raise ValueError(f"attempt {ctx.attempt}")

    task_id = await api.schedule(QUEUE, attempts=3, backoff=10)
    async with run_worker([task(handler)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["attempts"] == 3
    assert is_failure(row["error"], "attempt 3")


async def test_handler_raised_unrecoverably(run_worker: RunWorker, api: Api) -> None:
    gate = Gate(UnrecoverableError("the account is closed"))
    gate.opened.set()
    task_id = await api.schedule(QUEUE, attempts=3)
    async with run_worker([task(gate)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["attempts"] == 1
    assert is_now(row["failedAt"])
    assert is_failure(row["error"], "the account is closed")


class WelcomeEmail(BaseModel):
    email: str
    name: str
    age: int = 0


async def test_payload_does_not_validate(run_worker: RunWorker, api: Api) -> None:
    handler = MustNotRun()
    task_id = await api.schedule(QUEUE, {"email": "a@b.c", "age": "old"}, attempts=3)
    before = await api.db.row(task_id)
    async with run_worker([define_task(QUEUE, handler, payload=WelcomeEmail)]):
        written = patch(before, await api.until_both_say(QUEUE, task_id, "failed"))
    assert not handler.ran
    assert is_now(written.pop("failedAt"))
    reason = written.pop("error")["reason"]
    assert "name: " in reason
    assert "age: " in reason
    assert "email: " not in reason
    assert written == {"status": "failed", "attempts": 1}


@pytest.mark.parametrize(
    ("attempts", "backoff", "status"), [(2, HOUR_MS, "delayed"), (1, HOUR_MS, "failed")]
)
async def test_handler_ran_past_its_time_limit(
    run_worker: RunWorker, api: Api, attempts: int, backoff: int, status: str
) -> None:
    task_id = await api.schedule(QUEUE, attempts=attempts, backoff=backoff)
    async with run_worker([task(hang, timeout_ms=50)]):
        row = await api.until_both_say(QUEUE, task_id, status)
    assert row["attempts"] == 1
    assert "time limit of 50 ms" in row["error"]["reason"]
