"""What runs beside the slots: the renewal of locks, and the check for stalled jobs."""

import asyncio
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Final

import structlog
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import ResponseError

from autoflow_worker.broker.claim import Claim
from autoflow_worker.broker.job_queue import OUTAGE_PAUSE_MAX, JobQueue

log = structlog.get_logger(__name__)

STALLED_INTERVAL_MS: Final = 30_000
"""BullMQ's `stalledInterval`, in ms: how often a worker looks for the jobs of dead workers."""


class Maintenance:
    """The endless loops of one TaskWorker that are not slots; `running` is what it holds."""

    def __init__(
        self, queue: JobQueue, running: Collection[Claim], options: Mapping[str, Any]
    ) -> None:
        self._queue = queue
        self._running = running
        self._renew_every: float = options.get("lockRenewTime", queue.lock_ms / 2) / 1000
        self._look_every: float = options.get("stalledInterval", STALLED_INTERVAL_MS) / 1000

    async def keep_locks(self) -> None:
        """Renew the locks of the running jobs, for ever."""
        lock, renew = self._queue.lock_ms / 1000, self._renew_every
        while True:
            await asyncio.sleep(renew / 2)
            soon = asyncio.get_running_loop().time() + lock - renew / 2
            due = [claim for claim in self._running if claim.locked_until < soon]
            await self._queue.insist(partial(self._queue.extend, due))

    async def watch_stalled(self) -> None:
        """Return stalled jobs to the queue, and keep a paused queue's jobs together, for ever."""
        now = asyncio.get_running_loop().time
        while True:
            await self._queue.connected()
            if (left := self._calm_in()) > 0:
                await asyncio.sleep(min(left, OUTAGE_PAUSE_MAX))
                continue
            try:
                # Renew our locks immediately before the check. Redis runs both in order, so our own
                # jobs can't look stalled.
                began = now()
                await self._queue.extend(list(self._running))
                if self._calm_in() > 0 or now() - began > self._renew_every:
                    continue  # The renewal waited for a connection, or this process stood still.
                for job_id in await self._queue.check_stalled():
                    log.warning("job_stalled", queue=self._queue.name, task_id=job_id)
                if joined := await self._queue.join_paused():
                    # BullMQ 5 and 6 both change this paused queue (docs/contract.md, section 9).
                    log.warning("paused_lists_joined", queue=self._queue.name, jobs=joined)
            except RedisConnectionError:
                await asyncio.sleep(OUTAGE_PAUSE_MAX)
                continue
            except ResponseError as error:
                # BullMQ's script breaks on a job that is no hash, and has removed that job by then.
                log.error("stalled_check_refused", queue=self._queue.name, reason=str(error))
            await asyncio.sleep(self._look_every)

    def _calm_in(self) -> float:
        """Return the seconds until every worker has had the time to renew its locks.

        Locks expire during an outage while their jobs run on: these jobs are not stalled.
        """
        calm_at = self._queue.up_since + self._renew_every + 2 * OUTAGE_PAUSE_MAX
        return calm_at - asyncio.get_running_loop().time()
