"""A slow task that reports its progress."""

import asyncio
from datetime import date

from pydantic import BaseModel

from autoflow_worker import TaskContext, TaskOptions, define_task


class Report(BaseModel):
    customer: str
    month: date


class Finished(BaseModel):
    url: str
    pages: int


async def build_report(payload: Report, ctx: TaskContext) -> Finished:
    pages = 5
    for page in range(1, pages + 1):
        await asyncio.sleep(0.2)
        await ctx.job.updateProgress(100 * page // pages)
    return Finished(url=f"/reports/{payload.customer}/{payload.month:%Y-%m}.pdf", pages=pages)


build_report_task = define_task(
    queue_name="reports-build",
    handler=build_report,
    options=TaskOptions(timeout_ms=60_000, concurrency=4),
)
