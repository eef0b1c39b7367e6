"""A TypedDict as the payload, a time limit, and a job that fails at each attempt."""

import asyncio
from typing import Any

from typing_extensions import TypedDict  # pydantic accepts the one of `typing` from Python 3.12 on

from autoflow_worker import TaskContext, TaskOptions, define_task


class Webhook(TypedDict):
    url: str
    event: dict[str, Any]


async def deliver_webhook(payload: Webhook, ctx: TaskContext) -> dict[str, object]:
    if payload["url"].startswith("https://slow."):
        await asyncio.sleep(60)  # cancelled at the time limit
    if payload["url"].startswith("https://gone."):
        raise ConnectionError(f"{payload['url']} refuses connections")
    return {"status": 200, "correlation_id": ctx.correlation_id}


deliver_webhook_task = define_task(
    queue_name="webhooks-deliver",
    handler=deliver_webhook,
    options=TaskOptions(max_attempts=3, backoff_ms=200, timeout_ms=300, concurrency=10),
)
