"""Data that is too large to be parsed, and data that must not be parsed at all."""

import json
from typing import Any

from redis.asyncio import Redis

from autoflow_worker import TaskContext, define_task
from tests.support.api import Api
from tests.support.running import RunWorker

QUEUE = "q"


async def test_data_beyond_the_limit_is_refused_unparsed(run_worker: RunWorker, api: Api) -> None:
    ran: list[int] = []

    async def handler(payload: dict[str, Any], ctx: TaskContext) -> None:
        ran.append(len(payload["text"]))

    async with run_worker([define_task(QUEUE, handler)], max_payload_bytes=1_024):
        fits = await api.schedule(QUEUE, {"text": "x" * 900})
        # Fewer characters than the limit, and more bytes.
        too_large = await api.schedule(QUEUE, {"text": "ü" * 600}, attempts=3)
        await api.until_both_say(QUEUE, fits, "completed")
        row = await api.until_both_say(QUEUE, too_large, "failed")
    assert ran == [900]
    assert "MAX_PAYLOAD_BYTES allows 1,024" in row["error"]["reason"]
    assert row["attempts"] == 1


async def test_the_data_of_a_job_that_stalled_too_often_is_not_parsed(
    run_worker: RunWorker, api: Api, redis: Redis, prefix: str
) -> None:
    """It may be what killed the workers that took it."""

    async def handler(payload: object, ctx: TaskContext) -> None:
        raise AssertionError("it never runs")

    task_id = await api.schedule(QUEUE, {"n": 1})
    why = "job stalled more than allowable limit"
    fields: Any = {"data": json.dumps({"n": 1})[:-1], "defa": why}
    await redis.hset(f"{prefix}:{QUEUE}:{task_id}", mapping=fields)
    async with run_worker([define_task(QUEUE, handler)]):
        row = await api.until_both_say(QUEUE, task_id, "failed")
    assert row["error"]["reason"] == why
