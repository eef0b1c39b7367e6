"""One job at a time, ordered by priority."""

import asyncio
from typing import Any

from autoflow_worker import TaskContext, TaskOptions, define_task


async def triage_ticket(payload: dict[str, Any], ctx: TaskContext) -> dict[str, str]:
    await asyncio.sleep(0.01)
    return {"team": "billing" if "invoice" in str(payload.get("title")) else "support"}


triage_ticket_task = define_task("tickets-triage", triage_ticket, TaskOptions(concurrency=1))
