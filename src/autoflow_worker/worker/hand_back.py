"""Handing jobs back to their queue, without using up their attempts."""

import asyncio
from collections.abc import Iterable
from functools import partial
from typing import Final

import structlog

from autoflow_worker.broker.claim import (
    ChildrenLeftError,
    Claim,
    LockLostError,
    MalformedJobError,
)
from autoflow_worker.broker.job_queue import JobQueue
from autoflow_worker.broker.job_schedulers import NotAdvancedError
from autoflow_worker.clock import now_ms
from autoflow_worker.recording import patches
from autoflow_worker.worker.history import JobHistory

log = structlog.get_logger(__name__)

RECORD_ONE: Final = 5.0
"""Seconds that recording `pending` may take while the worker goes on."""

RECORD_ALL: Final = 0.3
"""Seconds that recording `pending` may take at the deadline."""

RERUN_DELAY: Final = 5.0
"""Seconds until a job runs again whose outcome PostgreSQL refused; doubled with each claim."""

RERUN_DELAY_MAX: Final = 60.0


class HandBack:
    """Hands back the jobs of one queue.

    Each job goes back whether or not PostgreSQL records it in time: its next start makes the row
    right.
    """

    def __init__(self, queue: JobQueue) -> None:
        self._queue = queue

    async def job(self, claim: Claim, until_ms: int = 0) -> None:
        """Hand back a job, without a word in its row.

        Args:
            until_ms: when it is to run again, in epoch ms; at once, if that is past.
        """
        await self._queue.insist(partial(self._move, claim.id, claim.token, until_ms))

    async def broken(self, claim: Claim, history: JobHistory) -> None:
        """Hand back a job whose attempt broke in the worker itself.

        Raises:
            LockLostError: another worker has the job.
        """
        try:
            async with asyncio.timeout(RECORD_ONE):
                await history.follow(patches.handed_back_patch())
        except TimeoutError:
            log.warning("handed_back_jobs_not_recorded", queue=self._queue.name)
        await self.job(claim)

    async def unrecorded(self, claim: Claim, history: JobHistory, reason: str) -> None:
        """Hand back a job whose outcome can't be recorded; its work is done again, later."""
        delay_s = min(RERUN_DELAY * 2 ** min(claim.attempts_started - 1, 10), RERUN_DELAY_MAX)
        log.error(
            "job_runs_again",
            queue=self._queue.name,
            task_id=claim.id,
            delay_s=delay_s,
            reason=reason,
        )
        until_ms = now_ms() + int(delay_s * 1000)
        await history.run_again(until_ms)
        await self.job(claim, until_ms)

    async def unadvanced(self, claim: Claim, history: JobHistory, error: NotAdvancedError) -> None:
        """Hand back a job whose scheduler can't produce the next one; nothing of it has run.

        Node leaves such a job in `active`, until it counts as stalled. It would be the last one of
        its scheduler, so it is kept until the scheduler is mended or removed.
        """
        log.error(
            "job_scheduler_not_advanced",
            queue=self._queue.name,
            task_id=claim.id,
            scheduler=claim.scheduler,
            pattern=error.pattern,
            reason=str(error),
            tried_again_in_s=self._queue.lock_ms / 1000,
            way_out="upsert the scheduler with a pattern that works, or remove it",
        )
        until_ms = now_ms() + self._queue.lock_ms
        await history.run_again(until_ms)
        await self.job(claim, until_ms)

    async def everything(self, owner: str, running: Iterable[JobHistory]) -> None:
        """Hand back all jobs that Redis says are ours, also those of replies that were lost.

        Args:
            owner: what the tokens of our locks begin with.
            running: the histories of the jobs that were cut off.

        Raises:
            redis.exceptions.ConnectionError: perhaps some were handed back; call it again.
        """
        held = await self._queue.held(owner)
        patch = patches.handed_back_patch()
        writes = [each.follow(patch) for each in running if each.claim.id in held]
        try:
            async with asyncio.timeout(RECORD_ALL):
                await asyncio.gather(*writes)
        except TimeoutError:
            log.warning("handed_back_jobs_not_recorded", queue=self._queue.name)
        await asyncio.gather(*(self._move(*job) for job in held.items()))
        await self._queue.marker.put_back()

    async def _move(self, job_id: str, token: str, until_ms: int = 0) -> None:
        try:
            await self._queue.hand_back(job_id, token, until_ms)
            log.info("job_handed_back", queue=self._queue.name, task_id=job_id)
        except (LockLostError, MalformedJobError, ChildrenLeftError) as error:
            log.warning("job_lost", queue=self._queue.name, task_id=job_id, reason=str(error))
