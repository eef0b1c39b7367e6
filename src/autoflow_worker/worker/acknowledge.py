"""Telling BullMQ the outcome of a job, which PostgreSQL has committed."""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from autoflow_worker.broker.claim import Claim, Hold, LockLostError, MalformedJobError, Reply
from autoflow_worker.broker.job_queue import OUTAGE_PAUSE, OUTAGE_PAUSE_MAX, JobQueue
from autoflow_worker.clock import now_ms
from autoflow_worker.pauses import Pauses
from autoflow_worker.recording import patches
from autoflow_worker.worker.fetcher import Fetcher
from autoflow_worker.worker.history import JobHistory, OutcomeRefusedError

log = structlog.get_logger(__name__)


class Finish(NamedTuple):
    """The end of a job as its row tells it, for BullMQ."""

    field: str
    """`returnvalue` or `failedReason`."""
    value: str
    stack_trace: str | None = None


class Acknowledger:
    """Acknowledges the jobs of one task; its fetcher says whether to fetch the next job too."""

    def __init__(self, queue: JobQueue, fetcher: Fetcher) -> None:
        self._queue = queue
        self._fetcher = fetcher

    async def tell(
        self,
        claim: Claim,
        history: JobHistory,
        send: Callable[..., Awaitable[Reply]],
        finish: Callable[[], Finish] | None = None,
    ) -> Reply:
        """Tell BullMQ the outcome of a job, over every outage; return the reply.

        Args:
            send: runs BullMQ's script.
            finish: returns the end that the row tells, if the job ends; called if BullMQ's script
                breaks on the job.

        Raises:
            LockLostError: another worker has the job.
            ChildrenLeftError: the job has unfinished or failed children, so it can't complete.
        """
        pauses: Pauses | None = None
        while True:
            if not self._queue.is_connected:
                # The time at which a command is made becomes the time of the next claim.
                await self._queue.connected()
            try:
                return await send(fetch_next=self._fetcher.wants_more)
            except MalformedJobError as error:
                await self.bury(claim, history, error, None if finish is None else finish())
                # The script may have broken on the next job, after claiming it.
                return Reply(await self._claimed_unawares(claim))
            except LockLostError:
                # The lock may have expired during an outage.
                if (hold := await self._queue.whose(claim)) is Hold.GONE:
                    await self._queue.insist(lambda: self._queue.drop(claim))
                if hold is not Hold.OURS:
                    raise
            except RedisConnectionError:
                pauses = pauses or Pauses(OUTAGE_PAUSE, OUTAGE_PAUSE_MAX)
                await pauses.sleep()
                if not await self._queue.still_has(claim):
                    # BullMQ took the acknowledgement, and its reply was lost, perhaps with a job.
                    return Reply(await self._claimed_unawares(claim))

    async def _claimed_unawares(self, claim: Claim) -> Claim | None:
        owner = claim.token[: claim.token.rindex(":") + 1]
        return await self._queue.insist(lambda: self._fetcher.claimed_unawares(owner))

    async def bury(
        self, claim: Claim, history: JobHistory, error: Exception, finish: Finish | None = None
    ) -> None:
        """Finish a job on which BullMQ's scripts break, or which breaks this code.

        Args:
            finish: the end that its row tells already; without it the job fails for the error.

        Raises:
            LockLostError: another worker has the job.
        """
        queue = self._queue
        try:
            if await queue.insist(lambda: queue.is_finished(claim)):
                return
            if finish is None:
                now = now_ms()
                failure = patches.error_record(error, now_ms=now)
                patch = patches.failed_patch(now_ms=now, attempt=claim.attempt, error=failure)
                await history.finish(patch)
                finish = Finish("failedReason", failure["reason"], failure.get("stackTrace"))
            if not await queue.insist(partial(queue.bury, claim, *finish)):
                raise LockLostError("another worker took the job over")
            log.error("job_buried", queue=queue.name, task_id=claim.id, reason=str(error))
        except (RedisError, OutcomeRefusedError) as refusal:
            # The queue or the row is broken, and not this job. The job comes again.
            reason = str(refusal)
            log.error("job_not_buried", queue=queue.name, task_id=claim.id, reason=reason)
