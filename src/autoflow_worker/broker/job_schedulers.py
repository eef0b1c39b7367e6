"""BullMQ's job schedulers: each job that one of them produced lets it produce the next."""

from typing import Any, Final

from bullmq import Worker

from autoflow_worker.broker.claim import Claim

_REPEAT: Final = ("every", "pattern", "tz", "limit", "offset", "startDate", "endDate")
"""The fields of a job scheduler that say when it produces a job."""


async def advance_scheduler(worker: Worker, claim: Claim) -> None:
    """Let the job scheduler that produced this job produce its next one.

    It may be called twice for a job, as BullMQ checks that the job is the scheduler's latest.
    """
    job, options = claim.job, claim.job.opts
    if claim.malformed:
        options = await _options_of(worker, job.repeatJobKey)
    await worker.jobScheduler.upsertJobScheduler(
        job.repeatJobKey,
        options.get("repeat"),
        job.name,
        job.data,
        options,
        override=False,
        producer_id=job.id,
    )


async def _options_of(worker: Worker, scheduler_id: str) -> dict[str, Any]:
    """Return the options of a scheduler's next job, where its latest job can't be read."""
    scheduler = await worker.jobScheduler.getScheduler(scheduler_id) or {}
    repeat = {option: scheduler[option] for option in _REPEAT if option in scheduler}
    template = scheduler.get("template", {}).get("opts")
    options = template if isinstance(template, dict) else {}
    return {**options, "repeat": {**repeat, "count": scheduler.get("iterationCount", 0)}}
