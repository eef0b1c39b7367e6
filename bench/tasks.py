"""The tasks that the measured workers run; BENCH_QUEUES names their queues."""

import asyncio
import os
import time
from typing import Any

from autoflow_worker import TaskContext, define_task


async def handle(payload: dict[str, Any], _ctx: TaskContext) -> dict[str, Any]:
    """Do nothing; if the payload asks for it, tell the time, or fail."""
    if "fail" in payload:
        raise ValueError("as it was told")
    if "sleep" in payload:
        await asyncio.sleep(payload["sleep"])
        return {"endedAt": time.time() * 1000}
    if "sentAt" in payload:
        return {"waitedMs": time.time() * 1000 - payload["sentAt"]}
    return {"ok": True}


tasks = [define_task(name, handle) for name in os.environ["BENCH_QUEUES"].split(",")]
